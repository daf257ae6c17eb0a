"""The model families that can be trained: one row each.

A family that differs from these in its columns alone is one more row. One that needs a new norm, activation or rope
also adds it where its columns are read: ``NORMS`` and ``ACTIVATIONS`` of dpo_trainer.model.build, ``rope.TYPES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_api.models.keys import Keys
from dpo_api.models.windows import Windows, all_layers, chosen_layers, no_windows

Norm = Literal["rms", "layernorm1p"]
"""``rms``: x · w / √(mean(x²) + ε). ``layernorm1p``: (x - mean(x)) · (1 + w) / √(var(x) + ε) + b."""
Activation = Literal["swiglu", "relu2"]
"""``swiglu``: silu(gate) · up. ``relu2``: max(up, 0)², without a gate."""

HIDDEN_ACTS: dict[Activation, tuple[str, ...]] = {"swiglu": ("silu", "swish"), "relu2": ("relu2",)}
"""Activation → the values of config.json's ``hidden_act`` that mean it, the usual one first."""
GATED: frozenset[Activation] = frozenset({"swiglu"})
"""Activations of two projections, of which one is the other's gate."""
NORMS_WITH_BIAS: frozenset[Norm] = frozenset({"layernorm1p"})


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Hugging Face's names of a family's tensors, without ``.weight`` and ``.bias``.

    ``layers`` is followed by the layer's number; the names after it are inside a layer.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layers: str = "model.layers"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qk_norm: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    attention_output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The gate first; the up projection alone where the activation has no gate."""
    down: str = "mlp.down_proj"

    def layer(self, number: int) -> str:
        """Return the prefix of the names of the layer with that number, counted from 0."""
        return f"{self.layers}.{number}"


@dataclass(frozen=True, slots=True)
class Family:
    """One family of decoder-only transformers. The defaults are Llama's."""

    name: str
    """``model_type`` of its config.json."""
    norm: Norm = "rms"
    activation: Activation = "swiglu"
    epsilon: str = "rms_norm_eps"
    """Key of config.json for the norms' epsilon."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have biases."""
    qk_norm: bool = False
    """Whether each query and key head passes a norm before the rotary embedding."""
    partial_rotary: bool = False
    """Whether ``partial_rotary_factor`` may be below 1: that share of a head's channels turns."""
    windows: Callable[[Keys, int], Windows] = no_windows
    """Reads which of the layers have a sliding window."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Key of config.json that must not be set → what it would mean."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers' configuration class takes for keys that config.json leaves out."""
    tensors: TensorNames = field(default_factory=TensorNames)


_OUTPUT_BIAS = {"attention_bias": "a bias on o_proj"}
_MLP_BIAS = {"mlp_bias": "a bias in the MLP"}
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

_ROWS = (
    Family("llama", refused={**_OUTPUT_BIAS, **_MLP_BIAS}),
    # transformers ignores attention_bias for Mistral and Qwen2.
    Family("mistral", windows=all_layers, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    Family("qwen2", qkv_bias=True, windows=chosen_layers, defaults=_QWEN),
    Family("qwen3", qk_norm=True, windows=chosen_layers, refused=_OUTPUT_BIAS, defaults={**_QWEN, "head_dim": 128}),
    Family(
        "nemotron",
        norm="layernorm1p",
        activation="relu2",
        epsilon="norm_eps",
        partial_rotary=True,
        refused={"attention_bias": "a bias on q, k, v and o_proj", **_MLP_BIAS},
        defaults={"norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        tensors=TensorNames(gate_up=("mlp.up_proj",)),
    ),
)

FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
"""``model_type`` → its family."""
