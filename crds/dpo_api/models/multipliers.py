"""Constant factors on the way from tokens to logits: how each family's config.json says them."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_api.models.keys import Keys


@dataclass(frozen=True, slots=True)
class Multipliers:
    """The defaults are those of models without such factors."""

    embedding: float = 1.0
    """Of the embedding's output, rounded to its type."""
    attention: float | None = None
    """Of the scores QKᵀ; None for 1 / √head_dim."""
    residual: float = 1.0
    """Of what the attention and the MLP add."""
    logits: float = 1.0
    """What logits are divided by."""


def ones(_keys: Keys) -> Multipliers:
    """No factors."""
    return Multipliers()


def gemma3(keys: Keys) -> Multipliers:
    """Gemma 3: the embedding by √hidden_size, the scores by 1 / √query_pre_attn_scalar."""
    return Multipliers(
        embedding=keys.integer("hidden_size") ** 0.5, attention=keys.number("query_pre_attn_scalar") ** -0.5
    )


def granite(keys: Keys) -> Multipliers:
    """Granite: one key for each."""
    return Multipliers(
        embedding=keys.number("embedding_multiplier", 1.0),
        attention=keys.number("attention_multiplier", 1.0),
        residual=keys.number("residual_multiplier", 1.0),
        logits=keys.number("logits_scaling", 1.0),
    )
