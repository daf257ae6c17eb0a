"""Sliding-window attention: how each family's config.json says which layers have a window."""

from __future__ import annotations

from dpo_api.models.keys import Keys
from dpo_api.models.turning import some_turn

Windows = tuple[int | None, tuple[bool, ...]]
"""(tokens that a windowed layer sees, the query's own included; or None without windows), (whether each layer has a
window; empty means all of them)."""


def no_windows(_keys: Keys, _layers: int) -> Windows:
    """Every layer attends to all earlier tokens."""
    return None, ()


def all_layers(keys: Keys, _layers: int) -> Windows:
    """``sliding_window`` holds for every layer (Mistral)."""
    types = keys.raw.get("layer_types")
    if types:
        raise keys.error(
            "layer_types",
            types,
            "windows on some layers only (Ministral) are not supported; use a model with one window for all layers",
        )
    return (None if keys.get("sliding_window") is None else keys.integer("sliding_window")), ()


def chosen_layers(keys: Keys, layers: int) -> Windows:
    """``use_sliding_window`` turns windows on, for the layers of ``layer_types`` or from ``max_window_layers`` on."""
    if not keys.raw.get("use_sliding_window", False) or keys.get("sliding_window") is None:
        return None, ()
    types = keys.raw.get("layer_types")
    if types is None:
        first = keys.get("max_window_layers")
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise keys.error(
                "max_window_layers",
                first,
                "it must be an integer of at least 0; copy the model's original config.json",
            )
        windowed = tuple(layer >= first for layer in range(layers))
    else:
        windowed = _named(keys, layers)
    return (keys.integer("sliding_window"), windowed) if any(windowed) else (None, ())


def named_layers(keys: Keys, layers: int) -> Windows:
    """``use_sliding_window`` turns windows on, for the layers that ``layer_types`` names, or else for those of NoPE."""
    named = keys.raw.get("layer_types") is not None
    windowed = _named(keys, layers) if named else tuple(not turns for turns in some_turn(keys, layers))
    if not keys.raw.get("use_sliding_window", False) or keys.get("sliding_window") is None:
        if named and any(windowed):
            raise keys.error(
                "use_sliding_window",
                keys.raw.get("use_sliding_window"),
                "but layer_types names layers with a window; set both, or neither",
            )
        return None, ()
    return (keys.integer("sliding_window"), windowed) if any(windowed) else (None, ())


def all_but_each_nth(keys: Keys, layers: int) -> Windows:
    """Windows for the layers that ``layer_types`` names; without it, for all but each ``sliding_window_pattern``-th."""
    if keys.raw.get("layer_types") is not None:
        windowed = _named(keys, layers)
    else:
        pattern = keys.integer("sliding_window_pattern")
        windowed = tuple((layer + 1) % pattern != 0 for layer in range(layers))
    return (keys.integer("sliding_window"), windowed) if any(windowed) else (None, ())


def _named(keys: Keys, layers: int) -> tuple[bool, ...]:
    types = keys.raw.get("layer_types")
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != layers or any(str(kind) not in known for kind in types):
        raise keys.error(
            "layer_types",
            types,
            f"it must name full_attention or sliding_attention {layers} times; copy the model's original config.json",
        )
    return tuple(known[str(kind)] for kind in types)
