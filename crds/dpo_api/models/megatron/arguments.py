"""Megatron-LM's arguments, as a checkpoint keeps them → the model's shape."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from dpo_api.models.keys import Keys
from dpo_api.models.megatron.settings import LLAMA3
from dpo_api.models.megatron.shape import Activation, Norm, Shape
from dpo_api.models.megatron.torchfiles import TENSORS, Opaque


class Values:
    """The fields of a namespace."""

    fields: Mapping[str, Any]

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def __setstate__(self, state: object) -> None:
        self.fields = state if isinstance(state, Mapping) else {}


_UNUSED = (
    ("pathlib", "PosixPath"),
    ("signal", "Signals"),
    ("megatron.core.enums", "ModelType"),
    ("megatron.core.rerun_state_machine", "RerunMode"),
    ("megatron.core.rerun_state_machine", "RerunState"),
    ("megatron.core.rerun_state_machine", "RerunDiagnostic"),
    ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
    ("megatron.core.transformer.enums", "AttnBackend"),
    ("megatron.core.transformer.enums", "CudaGraphScope"),
    ("megatron.core.transformer.enums", "CudaGraphModule"),
    ("megatron.core.transformer.enums", "InferenceCudaGraphScope"),
)
NAMES: dict[tuple[str, str], object] = {
    **TENSORS,
    (Namespace.__module__, Namespace.__name__): Values,
    ("types", "SimpleNamespace"): Values,
    **dict.fromkeys(_UNUSED, Opaque),
}
"""What the common state of a checkpoint may name → what is used in its place."""

_DEFAULTS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 1.0,
    "rotary_base": 10000,
    "rope_scaling_factor": 8.0,
    "add_bias_linear": True,
    "norm_epsilon": 1e-5,
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
    "num_experts": (None, 0),
    "multi_latent_attention": (None, False),
    "rotary_interleaved": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "heterogeneous_layers_config_path": (None,),
    "window_attn_skip_freq": (None,),
    "qk_l2_norm": (None, False),
}
"""Argument → the values with which the model computes what is computed here."""


def shape_of(arguments: Mapping[str, Any], where: str, vocab: int, dtype: str) -> Shape:
    """Return the shape of a model, with the rows of its embedding and its type from the weights.

    Raises InvalidModelError naming the argument that is missing or means something that is not computed here.
    """
    keys = Keys(arguments, where, _DEFAULTS, file="checkpoint")
    for key, allowed in _ONLY.items():
        if keys.get(key) not in allowed:
            raise keys.error(key, keys.get(key), "it is not supported; use a model of another architecture")
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    grouped = keys.get("group_query_attention")
    scaling: dict[str, Any] | None = None
    if keys.get("use_rope_scaling"):
        scaling = {**LLAMA3, "factor": keys.number("rope_scaling_factor")}
    elif keys.get("rotary_seq_len_interpolation_factor") not in (None, 1):
        scaling = {"rope_type": "linear", "factor": keys.number("rotary_seq_len_interpolation_factor")}
    return Shape(
        layers=keys.integer("num_layers"),
        hidden=hidden,
        ffn=keys.integer("ffn_hidden_size"),
        heads=heads,
        groups=keys.integer("num_query_groups", heads) if grouped else heads,
        head_dim=keys.integer("kv_channels", hidden // heads),
        vocab=vocab,
        max_positions=keys.integer("max_position_embeddings", 4096),
        norm=_norm(keys),
        activation=_activation(keys),
        eps=keys.number("layernorm_epsilon" if "layernorm_epsilon" in arguments else "norm_epsilon"),
        rotary_percent=keys.number("rotary_percent"),
        rotary_base=keys.number("rotary_base"),
        rope_scaling=scaling,
        tied=not keys.get("untie_embeddings_and_output_weights"),
        qkv_bias=bool(keys.get("add_qkv_bias")),
        qk_norm=bool(keys.get("qk_layernorm")),
        window=_window(keys),
        dtype=dtype,
    )


def _norm(keys: Keys) -> Norm:
    norm, shifted = keys.get("normalization"), bool(keys.get("apply_layernorm_1p"))
    if norm == "LayerNorm":
        return "layernorm1p" if shifted else "layernorm"
    if norm == "RMSNorm":
        return "rmsnorm1p" if shifted else "rmsnorm"
    raise keys.error("normalization", norm, "supported are LayerNorm and RMSNorm; use a model of another architecture")


def _activation(keys: Keys) -> Activation:
    if keys.get("swiglu"):
        return "swiglu"
    if keys.get("squared_relu"):
        return "squared-relu"
    raise keys.error("swiglu", keys.get("swiglu"), "only swiglu and squared_relu are supported; use another model")


def _window(keys: Keys) -> int | None:
    window = keys.get("window_size")
    match window:
        case None:
            return None
        case (int(left), 0) if left >= 0:
            return left + 1
    raise keys.error("window_size", window, "it must be (tokens, 0); use a model of another architecture")
