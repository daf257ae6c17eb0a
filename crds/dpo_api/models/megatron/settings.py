"""model_config.yaml of NeMo 1.x → the model's shape. What would compute something else is refused by its key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dpo_api.errors import InvalidModelError
from dpo_api.models.keys import Keys
from dpo_api.models.megatron.shape import Activation, Norm, Shape

CONFIG = "model_config.yaml"
LARGEST = 4 << 20
"""Bytes of the file that are read."""
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron-Core's ``rope_scaling`` does; only the factor can be set."""

_ACTIVATIONS: dict[str, Activation] = {
    "fast-swiglu": "swiglu",
    "swiglu": "swiglu",
    "squared-relu": "squared-relu",
}
_NORMS: dict[str, Norm] = {"layernorm": "layernorm", "layernorm1p": "layernorm1p", "rmsnorm": "rmsnorm"}
_DEFAULTS: dict[str, Any] = {
    "layernorm_epsilon": 1e-5,
    "activation": "gelu",
    "normalization": "layernorm",
    "position_embedding_type": "learned_absolute",
    "rotary_percentage": 1.0,
    "rotary_base": 10000.0,
    "bias": True,
    "share_embeddings_and_output_weights": True,
    "transformer_block_type": "pre_ln",
    "normalize_attention_scores": True,
    "attention_type": "multihead",
}
"""NeMo's values for keys that the file leaves out."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "transformer_block_type": ("pre_ln",),
    "normalize_attention_scores": (True,),
    "attention_type": ("multihead",),
    "bias": (False,),
    "headscale": (None, False),
    "rotary_interleaved": (None, False),
    "use_emha": (None, False),
    "num_moe_experts": (None, 0, 1),
    "mamba_ssm_ngroups": (None,),
    "multi_query_attention": (None, False),
}
"""Key → the values with which the model computes what is computed here."""
_REFERENCE = re.compile(r"\$\{\.?(?:model\.)?(\w+)\}")


@dataclass(frozen=True, slots=True)
class NemoSettings:
    """What model_config.yaml says, as far as the weights are not needed for it."""

    keys: Keys
    legacy_qkv: bool
    """Whether the fused matrix has all queries, then all keys, then all values (Megatron-LM before version 2)."""

    def shape(self, vocab: int, dtype: str) -> Shape:
        """Return the model's shape, with the rows of its embedding and its type from the weights."""
        keys = self.keys
        for key, allowed in _ONLY.items():
            value = keys.get(key)
            if value not in allowed:
                only = "remove it" if None in allowed else f"only {json.dumps(allowed[0])} is supported"
                raise keys.error(key, value, f"{only}; use a model of another architecture")
        hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        if keys.get("kv_channels") is None and hidden % heads:
            raise keys.error("hidden_size", hidden, f"not divisible by num_attention_heads {heads}; set kv_channels")
        positions = keys.get("max_position_embeddings")
        key = "encoder_seq_length" if positions is None else "max_position_embeddings"
        return Shape(
            layers=keys.integer("num_layers"),
            hidden=hidden,
            ffn=keys.integer("ffn_hidden_size", 4 * hidden),
            heads=heads,
            groups=keys.integer("num_query_groups", heads),
            head_dim=keys.integer("kv_channels", hidden // heads),
            vocab=vocab,
            max_positions=keys.integer(key, 4096),
            norm=self._norm(),
            activation=_known(keys, "activation", _ACTIVATIONS),
            eps=keys.number("layernorm_epsilon"),
            rotary_percent=keys.number("rotary_percentage"),
            rotary_base=keys.number("rotary_base"),
            rope_scaling=self._scaling(),
            tied=bool(keys.get("share_embeddings_and_output_weights")),
            qkv_bias=bool(keys.get("qkv_bias")),
            qk_norm=bool(keys.get("qk_layernorm")),
            window=self._window(),
            dtype=dtype,
        )

    def _norm(self) -> Norm:
        norm = _known(self.keys, "normalization", _NORMS)
        if not self.keys.get("layernorm_zero_centered_gamma"):
            return norm
        return "rmsnorm1p" if norm == "rmsnorm" else "layernorm1p"

    def _scaling(self) -> dict[str, Any] | None:
        if self.keys.get("scale_positional_embedding"):  # the other key is then left over from a conversion
            return {**LLAMA3, "factor": 8.0}
        if self.keys.get("seq_len_interpolation_factor") in (None, 1):
            return None
        return {"rope_type": "linear", "factor": self.keys.number("seq_len_interpolation_factor")}

    def _window(self) -> int | None:
        window = self.keys.get("window_size")
        if window is None:
            return None
        match window:
            case [int(left), 0] if left >= 0:
                return left + 1
        raise self.keys.error("window_size", window, "it must be [tokens, 0]; use a model of another architecture")


def read_settings(data: bytes, where: str) -> NemoSettings:
    """Parse a model_config.yaml. Raises InvalidModelError naming ``where``."""
    try:
        text = data.decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise InvalidModelError(f"{where}: YAML aliases are not read; write their values out")
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        shown = str(error).split("\n")[0][:200]
        raise InvalidModelError(f"{where}: not valid YAML ({shown}); copy the archive again") from None
    if isinstance(raw, Mapping) and isinstance(raw.get("model"), Mapping):
        raw = raw["model"]
    if not isinstance(raw, Mapping):
        raise InvalidModelError(f"{where}: must hold the model's settings; copy the archive again")
    keys = Keys({str(key): _resolved(value, raw) for key, value in raw.items()}, where, _DEFAULTS, file=CONFIG)
    return NemoSettings(keys, legacy_qkv=bool(keys.get("megatron_legacy")))


def _resolved(value: object, raw: Mapping[str, object]) -> object:
    """Return a value, or that of the key beside it that it refers to (``${.encoder_seq_length}``)."""
    for _ in range(8):
        found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if found is None or found[1] not in raw:
            return value
        value = raw[found[1]]
    return value


def _known[T](keys: Keys, key: str, table: Mapping[str, T]) -> T:
    value = keys.get(key)
    found = table.get(str(value).lower())
    if found is None:
        raise keys.error(key, value, f"supported are {', '.join(table)}; use a model of another architecture")
    return found
