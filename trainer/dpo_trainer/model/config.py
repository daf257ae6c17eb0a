"""What a model is: everything that its weights and its forward pass depend on, read from a Hugging Face config.json."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dpo_api.errors import InvalidModelError
from dpo_api.validation import ModelFacts

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")

# What transformers' configuration classes take when config.json leaves a key out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies were stretched for long contexts.

    ``linear`` divides every frequency by ``factor`` (position interpolation). ``llama3`` divides those with a
    wavelength above ``original_max_positions / low_freq_factor`` tokens, keeps those below
    ``original_max_positions / high_freq_factor`` and blends in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with RMS norms, rotary positions, grouped heads and a gated SiLU MLP."""

    family: Family
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int  #: key/value heads; each serves num_attention_heads / num_query_groups query heads
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None  #: tokens a windowed layer sees, the query's own included
    windowed_layers: tuple[bool, ...] = ()  #: one a layer; empty means all layers when ``window`` is set
    qkv_bias: bool = False
    qk_norm: bool = False  #: an RMS norm over each query and key head before the rotary embedding
    tied_embeddings: bool = False
    max_positions: int = 4096
    dtype: str | None = None  #: "bfloat16", "float16" or "float32" as config.json says; None when it does not

    def window_of(self, layer: int) -> int | None:
        """The window of the 0-based ``layer``, or None when it sees everything."""
        if self.window is None or (self.windowed_layers and not self.windowed_layers[layer]):
            return None
        return self.window

    @property
    def facts(self) -> ModelFacts:
        """What the spec's validation needs to know of the model."""
        return ModelFacts(
            layers=self.num_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_query_groups,
            hidden=self.hidden_size,
            ffn=self.ffn_hidden_size,
            vocab=self.vocab_size,
            max_positions=self.max_positions,
            family=self.family,
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of what changes the model's output (the weights' dtype and the position limit do not)."""
        fields = asdict(self)
        del fields["dtype"], fields["max_positions"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_hugging_face(cls, raw: Mapping[str, Any], where: str) -> "ModelConfig":
        """Read the parsed config.json found at ``where``.

        Raises InvalidModelError naming the key, its value and the fix for everything that this trainer cannot
        reproduce.
        """
        return _Reader(raw, where).read()


class _Reader:
    """Reads keys with their types checked, and names what it refuses."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.defaults: Mapping[str, Any] = {}

    def fail(self, key: str, value: object, why: str) -> InvalidModelError:
        return InvalidModelError(f"{self.where}: {key} is {json.dumps(value, default=str)}: {why}")

    def get(self, key: str) -> Any:
        value = self.raw.get(key)
        # A key present as null means "none" to transformers; only an absent one takes the class's default.
        return self.defaults.get(key) if key not in self.raw else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise InvalidModelError(f"{self.where}: {key} is missing; copy the model's original config.json")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(key, value, "it must be a positive integer")
        return value

    def number(self, source: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = source.get(key, default)
        if value is None:
            raise InvalidModelError(f"{self.where}: {key} is missing from the rope settings")
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.fail(key, value, "it must be a positive number")
        return float(value)

    def read(self) -> ModelConfig:
        family = self._family()
        self.defaults = _DEFAULTS[family]
        self._refuse_unsupported(family)
        heads = self.integer("num_attention_heads")
        groups = self.integer("num_key_value_heads", heads)
        hidden = self.integer("hidden_size")
        layers = self.integer("num_hidden_layers")
        if self.get("head_dim") is None and hidden % heads:
            raise self.fail("hidden_size", hidden, f"not divisible by num_attention_heads {heads}; set head_dim")
        head_dim = self.integer("head_dim", hidden // heads)
        if heads % groups:
            raise self.fail("num_key_value_heads", groups, f"it must divide num_attention_heads {heads}")
        if head_dim % 2:
            raise self.fail("head_dim", head_dim, "it must be even, for the rotary embedding")
        theta, scaling = self._rope()
        window, windowed = self._windows(family, layers)
        return ModelConfig(
            family=family,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            ffn_hidden_size=self.integer("intermediate_size"),
            num_layers=layers,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            norm_eps=self.number(self.raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            window=window,
            windowed_layers=windowed,
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_embeddings=bool(self.raw.get("tie_word_embeddings", False)),
            max_positions=self.integer("max_position_embeddings", 4096),
            dtype=self._dtype(),
        )

    def _family(self) -> Family:
        model_type = self.raw.get("model_type")
        for family in FAMILIES:
            if model_type == family:
                return family
        fix = f"supported are {', '.join(FAMILIES)}; start from a model of one of these families"
        raise self.fail("model_type", model_type, fix)

    def _refuse_unsupported(self, family: Family) -> None:
        architectures = self.raw.get("architectures") or []
        if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
            raise self.fail(
                "architectures", architectures, "only …ForCausalLM models generate text; use the base model"
            )
        for key in _EXPERT_KEYS:
            if self.raw.get(key):
                raise self.fail(key, self.raw[key], "mixture-of-experts models are not supported; use a dense model")
        if self.raw.get("quantization_config"):
            method = self.raw["quantization_config"]
            raise self.fail(
                "quantization_config", method, "quantised weights cannot be trained; use the original model"
            )
        act = self.raw.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise self.fail("hidden_act", act, "only silu is supported")
        # transformers ignores attention_bias for Mistral and Qwen2; for the others it also puts a bias on o_proj.
        if family in ("llama", "qwen3") and self.raw.get("attention_bias"):
            raise self.fail("attention_bias", True, "a bias on o_proj is not supported; use a model without it")
        if family == "llama" and self.raw.get("mlp_bias"):
            raise self.fail("mlp_bias", True, "a bias in the MLP is not supported; use a model without it")

    def _rope(self) -> tuple[float, RopeScaling | None]:
        # transformers ≥ 5 writes rope_parameters alone; older versions rope_theta and rope_scaling.
        key = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"
        rope = self.raw.get(key) or {}
        if not isinstance(rope, Mapping):
            raise self.fail(key, rope, "it must be an object")
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise self.fail(key, rope, "one rope a layer type is not supported")
        theta = self.number(rope if "rope_theta" in rope else self.raw, "rope_theta", 10000.0)
        partial = rope.get("partial_rotary_factor", self.raw.get("partial_rotary_factor", 1.0))
        if partial not in (None, 1, 1.0):
            raise self.fail("partial_rotary_factor", partial, "only full rotary embedding (1.0) is supported")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind in ("default", None):
            return theta, None
        if kind == "linear":
            return theta, RopeScaling("linear", self.number(rope, "factor"))
        if kind == "llama3":
            return theta, RopeScaling(
                "llama3",
                self.number(rope, "factor"),
                self.number(rope, "low_freq_factor"),
                self.number(rope, "high_freq_factor"),
                int(
                    self.number(rope, "original_max_position_embeddings", self.integer("max_position_embeddings", 8192))
                ),
            )
        fix = "supported are default, linear and llama3; remove it if no text exceeds the model's original context"
        raise self.fail(f"{key}.rope_type", kind, fix)

    def _windows(self, family: Family, layers: int) -> tuple[int | None, tuple[bool, ...]]:
        if family == "llama":
            return None, ()
        types = self.raw.get("layer_types")
        if family == "mistral":
            if types:
                raise self.fail("layer_types", types, "alternating windows (Ministral) are not supported")
            return (None if self.get("sliding_window") is None else self.integer("sliding_window")), ()
        if not self.raw.get("use_sliding_window", False) or self.get("sliding_window") is None:
            return None, ()
        if types is None:
            first = self.get("max_window_layers")
            if not isinstance(first, int) or first < 0:
                raise self.fail("max_window_layers", first, "it must be an integer of at least 0")
            windowed = tuple(layer >= first for layer in range(layers))
        else:
            known = {"full_attention": False, "sliding_attention": True}
            if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
                raise self.fail(
                    "layer_types", types, f"it must name full_attention or sliding_attention {layers} times"
                )
            windowed = tuple(known[kind] for kind in types)
        return (self.integer("sliding_window"), windowed) if any(windowed) else (None, ())

    def _dtype(self) -> str | None:
        value = self.raw.get("dtype", self.raw.get("torch_dtype"))
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in ("bfloat16", "float16", "float32"):
            raise self.fail("dtype", value, "supported are bfloat16, float16 and float32")
        return name
