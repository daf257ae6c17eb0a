"""A Megatron model's settings, whichever file they come from, as the config.json of the family that computes the same.

Megatron-Core can be set to combinations that no model in Hugging Face's format has; those are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dpo_api.errors import InvalidModelError

Norm = Literal["layernorm", "layernorm1p", "rmsnorm", "rmsnorm1p"]
"""``1p``: the file holds w and the norm multiplies by 1 + w (zero-centred gamma)."""
Activation = Literal["swiglu", "squared-relu"]

ZERO_CENTRED_FAMILIES = ("nemotron",)
"""Families whose files hold w of 1 + w in Hugging Face's format too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a Megatron model computes."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    """Rows of the embedding, with those that pad it: the model's softmax counts them."""
    max_positions: int
    norm: Norm
    activation: Activation
    eps: float
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """As config.json has it, with its ``rope_type``."""
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    """Tokens that a layer sees, the query's own included."""
    dtype: str | None = None

    @property
    def family(self) -> str | None:
        """The family that computes the same; None if there is none."""
        plain = self.window is None and not self.qk_norm
        if self.activation == "squared-relu":
            return "nemotron" if self.norm.startswith("layernorm") and plain and not self.qkv_bias else None
        if self.norm.startswith("layernorm"):
            return "stablelm" if plain else None
        if self.qk_norm:
            return "qwen3" if not self.qkv_bias and self.window is None else None
        if self.qkv_bias:
            return "qwen2" if self.window is None else None
        return "llama" if self.window is None else "mistral"

    @property
    def gamma_offset(self) -> int:
        """What is added to a norm's weight of the file to get the family's."""
        return int(self.norm.endswith("1p")) - int(self.family in ZERO_CENTRED_FAMILIES)

    def config_json(self, where: str) -> dict[str, Any]:
        """Return the config.json. Raises InvalidModelError if no family computes the same."""
        family = self.family
        if family is None:
            raise InvalidModelError(
                f"{where}: no family combines {self.norm} and {self.activation}"
                f"{', qkv_bias' * self.qkv_bias}{', qk_layernorm' * self.qk_norm}"
                f"{', window_size' * (self.window is not None)}; use a model of another architecture"
            )
        rope: dict[str, Any] = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rotary_base}
        if family in _PARTIAL:
            rope["partial_rotary_factor"] = self.rotary_percent
        elif self.rotary_percent != 1:
            raise InvalidModelError(
                f"{where}: rotary_percentage is {self.rotary_percent}, which the family {family} does not have; use a"
                " model that rotates whole heads"
            )
        if self.head_dim * self.heads != self.hidden and family == "stablelm":
            raise InvalidModelError(
                f"{where}: kv_channels is {self.head_dim}, which the family {family} does not have; use a model whose"
                " kv_channels are hidden_size / num_attention_heads"
            )
        found: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[family]],
            "model_type": family,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "hidden_act": "relu2" if self.activation == "squared-relu" else "silu",
            "max_position_embeddings": self.max_positions,
            _EPSILONS.get(family, "rms_norm_eps"): self.eps,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rotary_base,
            "rope_parameters": rope,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if self.rope_scaling is not None:
            found["rope_scaling"] = self.rope_scaling
        if family in _PARTIAL:
            found["partial_rotary_factor"] = self.rotary_percent
        if family == "stablelm":
            found |= {"use_qkv_bias": self.qkv_bias, "qk_layernorm": False, "use_parallel_residual": False}
            found |= {"hidden_dropout": 0.0}
            del found["head_dim"]
        if family in ("mistral", "qwen2", "qwen3"):
            found["sliding_window"] = self.window
        if self.dtype is not None:
            found["dtype"] = found["torch_dtype"] = self.dtype
        return found


_PARTIAL = ("stablelm", "nemotron")
_EPSILONS = {"stablelm": "layer_norm_eps", "nemotron": "norm_eps"}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "nemotron": "NemotronForCausalLM",
}
