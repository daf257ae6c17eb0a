"""Layers without rotary embedding (NoPE): how each family's config.json says which they are."""

from __future__ import annotations

from dpo_api.models.keys import Keys


def all_turn(_keys: Keys, _layers: int) -> tuple[bool, ...]:
    """Every layer has the rotary embedding."""
    return ()


def some_turn(keys: Keys, layers: int) -> tuple[bool, ...]:
    """``no_rope_layers`` holds 1 for a layer that has it, or each ``no_rope_layer_interval``-th layer has none."""
    named = keys.raw.get("no_rope_layers")
    if named is None:
        interval = keys.integer("no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(named, list) or len(named) < layers or any(value not in (0, 1) for value in named):
        raise keys.error(
            "no_rope_layers",
            named,
            f"it must hold 0 or 1 for each of the {layers} layers; copy the model's original config.json",
        )
    return tuple(value == 1 for value in named[:layers])
