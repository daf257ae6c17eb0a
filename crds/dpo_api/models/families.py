"""The model families that can be trained: one row each.

A family that differs from these in its columns alone is one more row. One that needs a new norm, activation or rope
also adds it where its columns are read: ``NORMS`` and ``ACTIVATIONS`` of dpo_trainer.model.build, ``rope.TYPES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_api.models.keys import Keys
from dpo_api.models.multipliers import Multipliers, gemma3, granite, ones
from dpo_api.models.turning import all_turn, some_turn
from dpo_api.models.windows import Windows, all_but_each_nth, all_layers, chosen_layers, named_layers, no_windows

Norm = Literal["rms", "rms1p", "layernorm", "layernorm1p"]
"""``rms``: x · w / √(mean(x²) + ε). ``layernorm``: (x - mean(x)) · w / √(var(x) + ε) + b.
``rms1p``, ``layernorm1p``: the same with 1 + w.
"""
NormPlaces = Literal["before", "after", "both"]
"""Whether the attention and the MLP have a norm of what they read, of what they add to the residual, or of both."""
Activation = Literal["swiglu", "geglu", "relu2"]
"""``swiglu``: silu(gate) · up. ``geglu``: gelu(gate) · up, of the tanh form. ``relu2``: max(up, 0)², no gate."""

HIDDEN_ACTS: dict[Activation, tuple[str, ...]] = {
    "swiglu": ("silu", "swish"),
    "geglu": ("gelu_pytorch_tanh",),
    "relu2": ("relu2",),
}
"""Activation → the values of config.json's ``hidden_act`` that mean it, the usual one first."""
GATED: frozenset[Activation] = frozenset({"swiglu", "geglu"})
"""Activations of two projections, of which one is the other's gate."""
NORMS_WITH_BIAS: frozenset[Norm] = frozenset({"layernorm", "layernorm1p"})


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
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Or one name, of a tensor that holds the rows of q, then of k, then of v."""
    qk_norm: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    attention_output: str = "self_attn.o_proj"
    attention_norm_after: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_norm_after: str = "post_feedforward_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The gate first; the up projection alone where the activation has no gate. With a gate one name, too: of a tensor
    that holds the gate's rows, then those of the up projection."""
    down: str = "mlp.down_proj"

    def layer(self, number: int) -> str:
        """Return the prefix of the names of the layer with that number, counted from 0."""
        return f"{self.layers}.{number}"

    def projections(self, module: str) -> tuple[str, ...]:
        """Return the names in a layer of the linear layers that make one of those which ``lora.targetModules`` names.

        module: attention_qkv, attention_dense, mlp_fc1 or mlp_fc2, no group.
        """
        of = {"attention_qkv": self.qkv, "attention_dense": (self.attention_output,)}
        return {**of, "mlp_fc1": self.gate_up, "mlp_fc2": (self.down,)}[module]


@dataclass(frozen=True, slots=True)
class Family:
    """One family of decoder-only transformers. The defaults are Llama's."""

    name: str
    """``model_type`` of its config.json."""
    norm: Norm = "rms"
    activation: Activation = "swiglu"
    epsilon: str = "rms_norm_eps"
    """Key of config.json for the norms' epsilon."""
    qkv_bias: bool | str = False
    """Whether the query, key and value projections have biases, or the key of config.json that says it."""
    qk_norm: bool = False
    """Whether each query and key head passes a norm before the rotary embedding."""
    qk_norm_over_all: bool = False
    """Whether that norm is over all query heads together, and over all key heads."""
    norm_places: NormPlaces = "before"
    hidden_act: str = "hidden_act"
    """Key of config.json for the activation."""
    local_rope: bool = False
    """Whether windowed layers have a rotary base of their own."""
    partial_rotary: bool = False
    """Whether ``partial_rotary_factor`` may be below 1: that share of a head's channels turns."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """Those of ``rope.TYPES`` that transformers computes for this family as for others."""
    windows: Callable[[Keys, int], Windows] = no_windows
    """Reads which of the layers have a sliding window."""
    turning: Callable[[Keys, int], tuple[bool, ...]] = all_turn
    """Reads which of the layers have the rotary embedding; empty for all of them."""
    multipliers: Callable[[Keys], Multipliers] = ones
    """Reads the constant factors."""
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
    Family(
        "stablelm",
        norm="layernorm",
        epsilon="layer_norm_eps",
        qkv_bias="use_qkv_bias",
        partial_rotary=True,
        refused={
            "use_parallel_residual": "an MLP beside the attention",
            "qk_layernorm": "a norm of its own for each head",
            "head_dim": "a head size of its own",
        },
        defaults={"num_key_value_heads": 32, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    ),
    Family(
        "phi3",  # and Phi-4
        partial_rotary=True,
        rope_types=("default",),  # transformers takes all others for longrope
        windows=all_layers,
        defaults={"rms_norm_eps": 1e-5},
        tensors=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    ),
    Family(
        "smollm3",
        turning=some_turn,
        windows=named_layers,
        refused={**_OUTPUT_BIAS, **_MLP_BIAS},
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
        },
    ),
    Family("granite", multipliers=granite, refused={**_OUTPUT_BIAS, **_MLP_BIAS}),
    Family(
        "olmo2",
        qk_norm=True,
        qk_norm_over_all=True,
        norm_places="after",
        refused=_OUTPUT_BIAS,
        defaults={"rms_norm_eps": 1e-5},
    ),
    Family(
        "gemma3_text",
        norm="rms1p",
        norm_places="both",
        activation="geglu",
        hidden_act="hidden_activation",
        qk_norm=True,
        windows=all_but_each_nth,
        local_rope=True,
        multipliers=gemma3,
        refused={
            **_OUTPUT_BIAS,
            "attn_logit_softcapping": "a cap of the attention's scores",
            "final_logit_softcapping": "a cap of the logits",
            "use_bidirectional_attention": "attention to later tokens",
        },
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "tie_word_embeddings": True,
            "vocab_size": 262_208,
        },
        tensors=TensorNames(mlp_norm="pre_feedforward_layernorm"),
    ),
)

NOT_EXACT = {
    "gemma2": "its caps of scores and logits (attn_logit_softcapping, final_logit_softcapping) are not supported",
    "gemma3": "it reads images; of Gemma 3 those for text alone (gemma3_text) are supported",
}
"""``model_type`` of families close to these → why they are refused."""

FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
"""``model_type`` → its family."""
