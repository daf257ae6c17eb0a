"""config.json → ModelConfig. What the trainer cannot reproduce is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_api.models.config import ModelConfig
from dpo_api.models.families import FAMILIES, HIDDEN_ACTS, NOT_EXACT, Family
from dpo_api.models.keys import Keys
from dpo_api.models.rope import read_rope

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
# transformers' own key, and those of MLX and of older compressed-tensors.
_QUANTISED_KEYS = ("quantization_config", "quantization", "compression_config")
_DTYPES = ("bfloat16", "float16", "float32")


def parse_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Read the parsed config.json found at ``where``.

    Raises InvalidModelError naming the key, its value and the fix for everything that the trainer cannot reproduce.
    """
    family = _family(Keys(raw, where))
    keys = Keys(raw, where, family.defaults)
    _refuse_unsupported(keys, family)
    heads = keys.integer("num_attention_heads")
    groups = keys.integer("num_key_value_heads", heads)
    hidden = keys.integer("hidden_size")
    layers = keys.integer("num_hidden_layers")
    if keys.get("head_dim") is None and hidden % heads:
        raise keys.error("hidden_size", hidden, f"not divisible by num_attention_heads {heads}; set head_dim")
    head_dim = keys.integer("head_dim", hidden // heads)
    if heads % groups:
        raise keys.error(
            "num_key_value_heads",
            groups,
            f"it must divide num_attention_heads {heads}; copy the model's original config.json",
        )
    if head_dim % 2:
        raise keys.error(
            "head_dim", head_dim, "it must be even, for the rotary embedding; use a model with an even head size"
        )
    rope = read_rope(keys, head_dim, family)
    window, windowed = family.windows(keys, layers)
    return ModelConfig(
        family=family.name,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        ffn_hidden_size=keys.integer("intermediate_size"),
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        norm_eps=keys.number(family.epsilon, 1e-6),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        window=window,
        windowed_layers=windowed,
        qkv_bias=bool(keys.get(family.qkv_bias) if isinstance(family.qkv_bias, str) else family.qkv_bias),
        qk_norm=family.qk_norm,
        tied_embeddings=bool(keys.get("tie_word_embeddings")),
        max_positions=keys.integer("max_position_embeddings", 4096),
        dtype=_dtype(keys),
        norm=family.norm,
        activation=family.activation,
        rotary_dim=rope.turned,
        rope_layers=turning if not all(turning := family.turning(keys, layers)) else (),
        multipliers=family.multipliers(keys),
        norm_places=family.norm_places,
        qk_norm_over_all=family.qk_norm_over_all,
        local_rope_theta=rope.local_theta if window is not None else None,
    )


def _family(keys: Keys) -> Family:
    name = keys.raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        known = f"supported are {', '.join(FAMILIES)}; start from a model of one of these families"
        why = NOT_EXACT.get(name) if isinstance(name, str) else None
        raise keys.error("model_type", name, known if why is None else f"{why}; {known}")
    return family


def _refuse_unsupported(keys: Keys, family: Family) -> None:
    architectures = keys.raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise keys.error("architectures", architectures, "it must be a list; copy the model's original config.json")
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise keys.error("architectures", architectures, "only …ForCausalLM models generate text; use the base model")
    for key in _EXPERT_KEYS:
        if keys.raw.get(key):
            raise keys.error(key, keys.raw[key], "mixture-of-experts models are not supported; use a dense model")
    for key in _QUANTISED_KEYS:
        if keys.raw.get(key):
            raise keys.error(key, keys.raw[key], "quantised weights cannot be trained; use the original model")
    names = HIDDEN_ACTS[family.activation]
    act = keys.raw.get(family.hidden_act, names[0])
    if act not in names:
        raise keys.error(family.hidden_act, act, f"only {names[0]} is supported; use a model with this activation")
    for key, meaning in family.refused.items():
        if keys.raw.get(key):
            raise keys.error(key, keys.raw[key], f"{meaning} is not supported; use a model without it")


def _dtype(keys: Keys) -> str | None:
    value = keys.raw.get("dtype", keys.raw.get("torch_dtype"))
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise keys.error("dtype", value, "supported are bfloat16, float16 and float32; use the original model")
    return name
