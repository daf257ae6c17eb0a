"""The softmax of the LM head, for logits [R, V] on a GPU: one pass that reads them, and one that changes them in place.

Here too, m = exp(logit − peak), less the mass at the label (see dpo_trainer.logprobs). A row is read once for its
largest logit and Σ exp(logit − peak) together: when a larger logit is found, the sum so far is scaled (Milakov and
Gimelshein, Online normalizer calculation for softmax, 2018). All sums are fp32, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_api.sizing.head import ALIGNMENT

BLOCK = 8192
"""Values of a row that a program has in its registers at a time."""

_WARPS = 16


@triton.jit
def _statistics(logits, places, peaks, masses, targets, stride, columns, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * tl.multiple_of(stride, ALIGNMENT)
    peak = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(line + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(peak, tl.max(values, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # -inf - -inf would be NaN
        mass = mass * tl.exp(peak - base) + tl.sum(tl.exp(values - base), 0)
        peak = highest
    place = tl.load(places + row)
    target = tl.load(line + place, mask=place >= 0, other=0.0).to(tl.float32)
    tl.store(peaks + row, peak)
    tl.store(masses + row, mass)
    tl.store(targets + row, target)


@triton.jit
def _slope(logits, places, peaks, masses, stride, columns, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * tl.multiple_of(stride, ALIGNMENT)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(line + at, mask=at < columns, other=0.0).to(tl.float32)
    slope = tl.exp(values - tl.load(peaks + row))
    slope = tl.where(at == tl.load(places + row), slope - tl.load(masses + row), slope)
    tl.store(line + at, slope.to(logits.dtype.element_ty), mask=at < columns)


def statistics(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's largest logit, its mass Σ exp(logit − largest) and the logit of its label: fp32 [R] each.

    logits: [R, V], bf16, fp16 or fp32; each row begins at a multiple of ALIGNMENT values. places: int64 [R], the
    label's column; -1 if it is none of these, which gives the logit 0. A row that has NaN or +inf gives the mass NaN.
    """
    peak, mass, target = (torch.empty(logits.shape[0], device=logits.device) for _ in range(3))
    if logits.shape[0]:
        _statistics[(logits.shape[0],)](
            logits,
            places,
            peak,
            mass,
            target,
            logits.stride(0),
            logits.shape[1],
            ALIGNMENT=ALIGNMENT,
            BLOCK=BLOCK,
            num_warps=_WARPS,
        )
    return peak, mass, target


def slope_in_place(logits: Tensor, places: Tensor, peak: Tensor, mass: Tensor) -> None:
    """logits [R, V] → exp(logit − peak), less the mass at the label: −mass · ∂ log p(label) / ∂ logit, in place.

    peak, mass: fp32 [R], of the whole vocabulary. places: as in ``statistics``.
    """
    if logits.shape[0]:
        blocks = -(-logits.shape[1] // BLOCK)
        _slope[(logits.shape[0], blocks)](
            logits,
            places,
            peak,
            mass,
            logits.stride(0),
            logits.shape[1],
            ALIGNMENT=ALIGNMENT,
            BLOCK=BLOCK,
            num_warps=_WARPS,
        )
