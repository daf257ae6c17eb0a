"""A model's configuration as Megatron's settings. What they cannot say is refused by the name of the field."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import yaml

from dpo_api.errors import InvalidModelError, InvalidSpecError
from dpo_api.models.config import ModelConfig
from dpo_api.models.families import Norm as OurNorm
from dpo_api.models.megatron.settings import LLAMA3, read_settings
from dpo_api.models.megatron.shape import Activation, Norm, Shape
from dpo_api.models.reader import parse_config
from dpo_api.models.rope import RopeScaling

_NORMS: dict[OurNorm, Norm] = {"rms": "rmsnorm", "layernorm": "layernorm", "layernorm1p": "layernorm1p"}
_ACTIVATIONS: dict[str, Activation] = {"swiglu": "swiglu", "relu2": "squared-relu"}
NOT_COMPUTED = {"family", "dtype", "max_positions"}
"""Fields of a configuration that change no logit."""


def shape_of(config: ModelConfig, where: str) -> Shape:
    """Return the Megatron model that computes what ``config`` says.

    Raises InvalidModelError naming ``where`` and the field that no Megatron model has.
    """
    norm, activation = _NORMS.get(config.norm), _ACTIVATIONS.get(config.activation)
    if norm is None:
        raise _refusal(where, "norm", config.norm)
    if activation is None:
        raise _refusal(where, "activation", config.activation)
    shape = Shape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_query_groups,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        max_positions=config.max_positions,
        norm=norm,
        activation=activation,
        eps=config.norm_eps,
        rotary_percent=(config.rotary_dim or config.head_dim) / config.head_dim,
        rotary_base=config.rope_theta,
        rope_scaling=_scaling(config, where),
        tied=config.tied_embeddings,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        window=config.window,
        dtype=config.dtype,
    )
    # The way back shows whether all was said: a field that is added to configurations later is then refused too.
    back = asdict(parse_config(shape.config_json(where), where))
    for name, value in asdict(config).items():
        if name not in NOT_COMPUTED and back[name] != value:
            raise _refusal(where, name, value)
    return shape


def check_formats(config: ModelConfig, formats: Collection[str]) -> None:
    """Raise InvalidSpecError if one of ``output.formats`` cannot say what the model computes."""
    for form in formats:
        try:
            describe(config, form, "spec.output.formats")
        except InvalidModelError as error:
            raise InvalidSpecError(f"{error}; leave {form} out") from None


def describe(config: ModelConfig, form: str, where: str) -> None:
    """Raise InvalidModelError naming ``where`` if a format, ``megatron`` or ``nemo``, cannot say what is computed."""
    shape = shape_of(config, where)
    if form == "nemo":
        nemo_settings(shape, {}, where)
    else:
        megatron_arguments(shape, where)


def nemo_settings(shape: Shape, tokenizer: dict[str, Any], where: str) -> bytes:
    """Return the model_config.yaml of a .nemo archive with the layout of Megatron-Core.

    Raises InvalidModelError for a rotary embedding that NeMo has no key for.
    """
    scaling = shape.rope_scaling or {}
    found: dict[str, Any] = {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "mcore_gpt": True,
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "encoder_seq_length": shape.max_positions,
        "max_position_embeddings": shape.max_positions,
        "layernorm_epsilon": shape.eps,
        "normalization": shape.norm,
        "activation": {"swiglu": "fast-swiglu"}.get(shape.activation, shape.activation),
        "position_embedding_type": "rope",
        "rotary_percentage": shape.rotary_percent,
        "rotary_base": shape.rotary_base,
        "seq_len_interpolation_factor": scaling.get("factor") if scaling.get("rope_type") == "linear" else None,
        "scale_positional_embedding": scaling.get("rope_type") == "llama3",
        "rotary_interleaved": False,
        "bias": False,
        "qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "window_size": None if shape.window is None else [shape.window - 1, 0],
        "share_embeddings_and_output_weights": shape.tied,
        "make_vocab_size_divisible_by": 1,
        "transformer_block_type": "pre_ln",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "precision": {"bfloat16": "bf16", "float16": "16"}.get(shape.dtype or "", "32"),
        "tokenizer": tokenizer,
    }
    data = yaml.safe_dump(found, sort_keys=False).encode()
    back = read_settings(data, where).shape(shape.vocab, shape.dtype or "")
    if (back.rope_scaling or None) != (shape.rope_scaling or None):
        raise InvalidModelError(f"{where}: NeMo has no setting for rope_scaling {shape.rope_scaling}")
    return data


def megatron_arguments(shape: Shape, where: str) -> dict[str, Any]:
    """Return Megatron-LM's arguments, as its checkpoints hold them. Raises InvalidModelError like ``nemo_settings``."""
    found: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "group_query_attention": shape.groups != shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "seq_length": shape.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "rotary_base": int(shape.rotary_base) if shape.rotary_base == int(shape.rotary_base) else shape.rotary_base,
        "rotary_percent": shape.rotary_percent,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
        "normalization": "RMSNorm" if shape.norm.startswith("rms") else "LayerNorm",
        "apply_layernorm_1p": shape.norm.endswith("1p"),
        "norm_epsilon": shape.eps,
        "swiglu": shape.activation == "swiglu",
        "squared_relu": shape.activation == "squared-relu",
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "window_size": None if shape.window is None else (shape.window - 1, 0),
        "untie_embeddings_and_output_weights": not shape.tied,
        "padded_vocab_size": shape.vocab,
        "vocab_size": shape.vocab,
        "make_vocab_size_divisible_by": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "bf16": shape.dtype == "bfloat16",
        "fp16": shape.dtype == "float16",
    }
    scaling = shape.rope_scaling
    if scaling is not None:
        factor, kind = scaling["factor"], scaling["rope_type"]
        if kind == "llama3" and {**LLAMA3, "factor": factor} == scaling:
            found |= {"use_rope_scaling": True, "rope_scaling_factor": factor}
        elif kind == "linear" and factor == int(factor):
            found["rotary_seq_len_interpolation_factor"] = int(factor)
        else:
            raise InvalidModelError(f"{where}: Megatron-LM has no argument for rope_scaling {scaling}")
    return found


def _scaling(config: ModelConfig, where: str) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if not isinstance(scaling, RopeScaling):
        raise _refusal(where, "rope_scaling", asdict(scaling))
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return found


def _refusal(where: str, name: str, value: object) -> InvalidModelError:
    return InvalidModelError(f"{where}: no Megatron model has {name} {value!r}")
