"""Rotary position embeddings as config.json describes them. A new type is one function and one entry of ``TYPES``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo_api.models.families import Family
from dpo_api.models.keys import Keys


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are changed for longer contexts.

    ``linear`` divides every frequency by ``factor`` (position interpolation). ``llama3`` divides those with a
    wavelength above ``original_max_positions / low_freq_factor`` tokens, keeps those below
    ``original_max_positions / high_freq_factor`` and interpolates between the two.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): channels are scaled by how often they turn in the original context.

    The frequencies of those that turn less than ``beta_slow`` times are divided by ``factor``, those of more than
    ``beta_fast`` times are kept, and those between are blended by the channel's number. The rotated queries and keys
    are multiplied by ``attention_factor``.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the blend begins and ends at whole channels."""


Scaling = RopeScaling | YarnScaling


def _linear(rope: Keys, _model: Keys) -> RopeScaling:
    return RopeScaling("linear", rope.number("factor"))


def _llama3(rope: Keys, model: Keys) -> RopeScaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error(
            "high_freq_factor", high, f"it must be above low_freq_factor {low}; copy the model's original config.json"
        )
    return RopeScaling("llama3", rope.number("factor"), low, high, _original(rope, model))


def _yarn(rope: Keys, model: Keys) -> YarnScaling:
    factor = rope.number("factor")
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if fast <= slow:
        raise rope.error("beta_fast", fast, f"it must be above beta_slow {slow}; copy the model's original config.json")
    mscale = [rope.number(key) for key in ("mscale", "mscale_all_dim") if rope.raw.get(key)]
    attention = [_magnitude(factor, one) for one in mscale] if len(mscale) == 2 else [_magnitude(factor), 1.0]
    return YarnScaling(
        factor,
        _original(rope, model),
        rope.number("attention_factor", attention[0] / attention[1]),
        fast,
        slow,
        truncate=bool(rope.raw.get("truncate", True)),
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's 0.1 · mscale · ln(factor) + 1, by which the paper multiplies rotated queries and keys."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original(rope: Keys, model: Keys) -> int:
    """Positions before the scaling. As in transformers, a key beside the rope's settings has priority over theirs."""
    key = "original_max_position_embeddings"
    outer = model if model.raw.get(key) is not None else rope
    return int(outer.number(key, model.integer("max_position_embeddings", 8192)))


TYPES: dict[str, Callable[[Keys, Keys], Scaling | None]] = {
    "default": lambda _rope, _model: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""``rope_type`` → what reads its settings: (the rope's own keys, the model's keys) → scaling."""
_LONGROPE = ("longrope", "su")  # "su": in older files


@dataclass(frozen=True, slots=True)
class Rope:
    """What config.json says of the rotary embedding."""

    theta: float
    """Its base."""
    scaling: Scaling | None
    turned: int | None
    """Channels of a head that turn; None: all of them."""
    local_theta: float | None
    """The base of windowed layers; None: that of the others."""


def read_rope(model: Keys, head_dim: int, family: Family) -> Rope:
    """Raises InvalidModelError for what cannot be reproduced."""
    # transformers ≥ 5 writes rope_parameters alone; older versions rope_theta and rope_scaling.
    key = "rope_parameters" if model.raw.get("rope_parameters") else "rope_scaling"
    raw = model.raw.get(key) or {}
    if not isinstance(raw, Mapping):
        raise model.error(key, raw, "it must be an object; copy the model's original config.json")
    local_theta = None
    if family.local_rope:
        local_theta, raw = _local(model, key, raw)
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise model.error(
            key, raw, "a different rope for each layer type is not supported; use a model with one for all layers"
        )
    rope = Keys(raw, model.where)
    theta = (rope if "rope_theta" in raw else model).number("rope_theta", 10000.0)
    kind = raw.get("rope_type", raw.get("type"))
    if kind not in (None, *family.rope_types):
        raise model.error(f"{key}.rope_type", kind, _instead_of(kind, family))
    turned = _rotary_dim(rope if "partial_rotary_factor" in raw else model, head_dim, partial=family.partial_rotary)
    return Rope(theta, TYPES[kind or "default"](rope, model), turned, local_theta)


def _local(model: Keys, key: str, raw: Mapping[str, Any]) -> tuple[float, Mapping[str, Any]]:
    """Return the base of windowed layers, and the settings of the others."""
    names = ("sliding_attention", "full_attention")
    if key == "rope_scaling" or not raw:
        return model.number("rope_local_base_freq"), raw
    if any(not isinstance(raw.get(name), Mapping) for name in names):
        raise model.error(key, raw, f"it must hold {' and '.join(names)}; copy the model's original config.json")
    local, others = (Keys(raw[name], model.where) for name in names)
    if local.raw.get("rope_type", "default") != "default":
        fix = "only default is supported for layers with a window; use a model of another family"
        raise model.error(f"{key}.{names[0]}.rope_type", local.raw["rope_type"], fix)
    return (local if "rope_theta" in local.raw else model).number("rope_theta", 1e4), others.raw


def _instead_of(kind: object, family: Family) -> str:
    if kind in _LONGROPE:
        return "frequencies that depend on the length of the text are not supported; use a model without longrope"
    *most, last = family.rope_types
    known = f"supported are {', '.join(most)} and {last}" if most else f"only {last} is supported for this family"
    return f"{known}; remove it if no text exceeds the model's original context"


def _rotary_dim(keys: Keys, head_dim: int, *, partial: bool) -> int | None:
    share = keys.number("partial_rotary_factor", 1.0)
    if share != 1 and not partial:
        raise keys.error(
            "partial_rotary_factor",
            share,
            "only full rotary embedding (1.0) is supported for this family; use a model of another family",
        )
    turned = int(head_dim * share)  # as transformers rounds it
    if share > 1 or turned < 2 or turned % 2:
        raise keys.error(
            "partial_rotary_factor",
            share,
            f"of the {head_dim} channels of a head, an even number must turn; copy the model's original config.json",
        )
    return None if turned == head_dim else turned
