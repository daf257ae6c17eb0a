"""Counts the floating-point operations (FLOPs) that a step needs, each once, and their share of what GPUs could do.

A matrix of k parameters costs 2k FLOPs per token forward, 2k for the gradient of its input and, if it is trained, 2k
for its own gradient (Kaplan et al., 2020). Attention multiplies queries with keys and weights with values: 4a FLOPs for
each key that a query sees, where a is the width of all query heads, and twice that backward. Not counted: what is
computed again (recomputation, the LM head's logits), norms, activations, the softmax and the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_api.models import ModelFacts
from dpo_api.sizing.parameters import adapter_of_layer, matrices_of_layer, query_width
from dpo_api.sizing.products import Product
from dpo_api.spec import DPOJobSpec, Lora


@dataclass(frozen=True)
class Work:
    """What some sequences are for a model, with a prompt that two responses share counted once."""

    tokens: float
    """Tokens that pass through the layers."""
    rows: float
    """Tokens whose logits are computed: those of responses."""
    seen: float
    """Keys that queries see, over all tokens and layers: the causal half of attention."""


def seen_keys(length: int, before: int = 0, window: int | None = None) -> int:
    """Return how many keys ``length`` tokens see that follow ``before`` others; its own and all before it are seen.

    window: most keys of a token, its own included.
    """

    def first(count: int) -> int:
        """Of the first ``count`` tokens of a sequence."""
        limit = count if window is None else min(count, window)
        return limit * (limit + 1) // 2 + (count - limit) * limit

    return first(before + length) - first(before)


def passes(*, trained: bool) -> int:
    """How many times 2k FLOPs per token a matrix costs forward and backward: with its own gradient if it is trained."""
    return 3 if trained else 2


def forward_flops(model: ModelFacts, work: Work) -> float:
    """FLOPs of a forward pass, as over the reference."""
    body = 2.0 * model.layers * matrices_of_layer(model) * work.tokens
    return body + head_flops(model) * work.rows + 4.0 * query_width(model) * work.seen


def head_flops(model: ModelFacts) -> float:
    """FLOPs of the LM head forward, for one token."""
    return 2.0 * model.vocab * model.hidden


def step_flops(model: ModelFacts, work: Work, lora: Lora | None) -> float:
    """FLOPs of a step's forward and backward passes.

    With LoRA the model's own matrices have no gradient, and layers below the first adapter no backward pass.
    """
    trained = lora is None
    below = 0 if lora is None else min(lora.layers or (0,))
    back = (model.layers - below) / model.layers
    body = 2.0 * model.layers * matrices_of_layer(model) * work.tokens * back * (passes(trained=trained) - 1)
    head = head_flops(model) * work.rows * (passes(trained=trained) - 1)
    attention = 2 * 4.0 * query_width(model) * work.seen * back
    adapters = 0.0
    if lora is not None:
        count = model.layers if lora.layers is None else len(lora.layers)
        adapters = 2.0 * passes(trained=True) * count * adapter_of_layer(model, lora) * work.tokens
    return forward_flops(model, work) + body + head + attention + adapters


def utilization(spec: DPOJobSpec, flops: float, seconds: float, gpus: int, product: Product | None) -> float | None:
    """Return the share of the GPUs' peak that ``flops`` in ``seconds`` are (MFU; Chowdhery et al., 2022).

    None where there is no peak to compare with: an unknown product, or fp32, for which the table has none.
    """
    if product is None or spec.training.precision != "bf16" or seconds <= 0:
        return None
    return flops / (seconds * gpus * product.tflops * 1e12)
