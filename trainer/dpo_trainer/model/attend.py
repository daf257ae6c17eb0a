"""softmax(QKᵀ/√d)V for each sequence of a plan, in the form that suits the device (``form_of``).

``varlen``: on GPUs one call of torch's FlashAttention for all sequences of the plan. It needs no mask: its causal mask
is aligned to the lower right corner, and a window is a number.

``pieces``: where that kernel does not compute (fp32, heads wider than 256), one ``scaled_dot_product_attention`` a
sequence, with a mask where there is a window.

``cpu``: one autograd function calls torch's flash attention for CPUs, which has no causal mask aligned to the lower
right corner: ``scaled_dot_product_attention`` would take its quadratic form. The keys before the queries' own and the
queries' own keys are two calls, merged by their log-sum-exp. FlashAttention's backward pass needs only the output and
the log-sum-exp of the whole row (Dao et al., FlashAttention, 2022, algorithm 4), so two calls with the merged ones give
the gradients of the whole.

Nothing of size queries · keys is stored, except a window's mask. With ``torch.use_deterministic_algorithms`` the
backward passes of all forms are deterministic.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_trainer.model.varlen import Interval, Masks, VarlenPlan

Form = Literal["cpu", "varlen", "pieces"]

WIDEST_HEAD = 256
"""Channels of a head that FlashAttention computes with at most; they must also be a multiple of 8 (Dao, 2023)."""


def form_of(device: torch.device, dtype: torch.dtype, channels: int) -> Form:
    """Return how attention is computed there, for values of this type and heads of this number of channels.

    The results of the forms differ by rounding.
    """
    if device.type == "cpu":
        return "cpu"
    return "varlen" if channels % 8 == 0 and _has_flash(device, dtype, channels) else "pieces"


def _has_flash(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether FlashAttention computes this: 16-bit numbers on GPUs of compute capability 8.0 or later."""
    if dtype not in (torch.bfloat16, torch.float16) or channels > WIDEST_HEAD or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, window: int | None, scale: float | None
) -> Tensor:
    """Attend within each sequence of the plan.

    query: [S, heads, d]; key, value: [K, groups, d], the plan's key rows. window: keys that a query sees, its own
    included; None for all before it. scale: of the scores, None for 1/√d. Returns [S, heads · d], zero for padding.
    """
    form = form_of(query.device, query.dtype, query.shape[-1])
    if form == "cpu":
        out: Tensor = _OnCPU.apply(query, key, value, plan, plan.masks(window, query), scale)
        return out
    by_form = attend_at_once if form == "varlen" else attend_by_piece
    return by_form(query, key, value, plan, window, scale)


def attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, window: int | None, scale: float | None
) -> Tensor:
    """Do what ``attend`` does with one call of FlashAttention for sequences of unlike lengths."""
    if plan.is_padding:
        return _nothing(query, key, value)
    kernel, has_groups = varlen_kernel()
    grouped = {"enable_gqa": True} if has_groups and query.shape[1] != key.shape[1] else {}
    # FlashAttention counts the keys before a query, the model those with its own. -1 is no bound.
    left = -1 if window is None or window >= plan.max_k else window - 1
    out: Tensor = kernel(
        query,
        key,
        value,
        plan.cu_q,
        plan.cu_k,
        plan.max_q,
        plan.max_k,
        scale=scale,
        window_size=(left, 0),
        **grouped,
    )
    return _without_padding(out, plan).flatten(1)


@cache
def varlen_kernel() -> tuple[Callable[..., Any], bool]:
    """Return torch's function, and whether fewer key heads than query heads must be announced to it.

    Without that parameter (torch 2.11) it hands any number of key heads on to the kernel.
    """
    from torch.nn.attention.varlen import varlen_attn  # its import takes most of a second: torch's compiler

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _without_padding(out: Tensor, plan: VarlenPlan) -> Tensor:
    """Return [S, heads, d] with zeros for padding, whose tokens attend to themselves within the call.

    As a sequence of their own they have finite outputs: rows that no sequence covers would not be written at all.
    """
    if not any(piece.padding for piece in plan.pieces):
        return out
    # The kernel has saved its output for the backward pass, so it is not changed in place.
    parts = zip(plan.pieces, out.split([piece.length for piece in plan.pieces]), strict=True)
    return torch.cat([torch.zeros_like(rows) if piece.padding else rows for piece, rows in parts])


def attend_by_piece(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, window: int | None, scale: float | None
) -> Tensor:
    """Do what ``attend`` does with one call of ``scaled_dot_product_attention`` a sequence."""
    if plan.is_padding:
        return _nothing(query, key, value)
    masks = plan.masks(window, query)
    # split's backward is one concatenation; slicing's would write a whole zero stream for every piece.
    queries = query.split([piece.length for piece in plan.pieces])
    counts = [piece.key_count for piece in plan.pieces]
    outputs: list[Tensor] = []
    for piece, q, k, v, mask in zip(plan.pieces, queries, key.split(counts), value.split(counts), masks, strict=True):
        if piece.padding:
            outputs.append(q.new_zeros(q.shape).flatten(1))
        else:
            outputs.append(_call(q, k, v, mask, scale))
    return torch.cat(outputs)


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    zeros: Tensor = _Nothing.apply(query, key, value)
    return zeros


class _Nothing(torch.autograd.Function):
    """Zeros, for a context-parallel rank without tokens: its backward pass takes part in the others' reductions."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.zeros_like(query).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.zeros_like, ctx.saved_tensors))


def _call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One sequence: query [L, heads, d]; key, value [K, groups, d]. Returns [L, heads · d]."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and (mask is not None or not _has_flash(query.device, query.dtype, query.shape[-1])):
        # Only the flash kernel has groups, and it takes no masks. The others would give way to the quadratic form.
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        grouped = False
    bias: Any = mask
    if bias is None:
        from torch.nn.attention.bias import causal_lower_right  # its import takes most of a second: torch's compiler

        bias = causal_lower_right(query.shape[0], key.shape[0])
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),  # [1, heads, L, d]
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=bias,
        scale=scale,
        enable_gqa=grouped,
    )
    return out.squeeze(0).transpose(0, 1).flatten(1)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _OnCPU(torch.autograd.Function):
    """``attend`` on the CPU. Saves its inputs, its output and one log-sum-exp for each query and head."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, masks: Masks, scale: float | None
    ) -> Tensor:
        parts: list[Tensor] = []
        sums: list[Tensor] = []
        for rows, before, own, mask in _sequences(plan, masks):
            if own is None:
                parts.append(torch.zeros_like(query[rows[0] : rows[1]]))
                continue
            q = _headed(query, rows)
            out, lse = _flash(
                q, _shared(key, own, q), _shared(value, own, q), 0.0, mask is None, attn_mask=mask, scale=scale
            )
            if before[1] > before[0]:
                first, first_lse = _flash(q, _shared(key, before, q), _shared(value, before, q), scale=scale)
                both = torch.logaddexp(first_lse, lse)
                out = torch.lerp(out.to(both.dtype), first.to(both.dtype), (first_lse - both).exp_().unsqueeze(-1))
                lse = both
            parts.append(_rows(out.to(query.dtype)))
            sums.append(lse)
        whole = torch.cat(parts)
        ctx.save_for_backward(query, key, value, whole, *sums)
        ctx.plan, ctx.masks, ctx.scale = plan, masks, scale
        return whole.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        grad = grad.contiguous().view(query.shape)
        to_query: list[Tensor] = []
        to_key: list[Tensor] = []
        to_value: list[Tensor] = []
        left = iter(sums)
        for rows, before, own, mask in _sequences(ctx.plan, ctx.masks):
            if own is None:
                for x, part, gradients in ((query, rows, to_query), (key, before, to_key), (value, before, to_value)):
                    gradients.append(torch.zeros_like(x[part[0] : part[1]]))
                continue
            q, o, g, lse = _headed(query, rows), _headed(out, rows), _headed(grad, rows), next(left)
            total: Tensor | None = None
            for keys in (before, own) if before[1] > before[0] else (own,):
                k, v, causal = _shared(key, keys, q), _shared(value, keys, q), keys is own and mask is None
                dq, dk, dv = _flash_backward(g, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=ctx.scale)
                total = dq if total is None else total.add_(dq)
                to_key.append(_unshared(dk, key))
                to_value.append(_unshared(dv, value))
            assert total is not None  # noqa: S101 - every sequence has keys of its own
            to_query.append(_rows(total))
        return torch.cat(to_query), torch.cat(to_key), torch.cat(to_value), None, None, None


def _sequences(plan: VarlenPlan, masks: Masks) -> Iterator[tuple[Interval, Interval, Interval | None, Tensor | None]]:
    """Each sequence's query rows, its key rows before the queries' own, the queries' own (None: padding), its mask.

    A mask covers all keys, so they count as the queries' own: one call.
    """
    cu_q, cu_k = plan.cu_q.tolist(), plan.cu_k.tolist()
    for index, (piece, mask) in enumerate(zip(plan.pieces, masks, strict=True)):
        rows, (first, last) = (cu_q[index], cu_q[index + 1]), (cu_k[index], cu_k[index + 1])
        split = first if mask is not None else last - piece.length
        if piece.padding:
            yield rows, (first, last), None, None
        else:
            yield rows, (first, split), (split, last), mask


def _headed(x: Tensor, rows: Interval) -> Tensor:
    """A view of [S, heads, d]'s rows as [1, heads, L, d]."""
    return x[rows[0] : rows[1]].transpose(0, 1).unsqueeze(0)


def _rows(x: Tensor) -> Tensor:
    """A view of [1, heads, L, d] as [L, heads, d]."""
    return x.squeeze(0).transpose(0, 1)


def _shared(x: Tensor, rows: Interval, query: Tensor) -> Tensor:
    """[K, groups, d]'s rows as keys or values of [1, heads, L, d] queries."""
    part = _headed(x, rows)
    times = query.shape[1] // part.shape[1]
    return part if times == 1 or flash_has_groups() else part.repeat_interleave(times, dim=1)


def _unshared(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``_shared``'s result → that of its rows, [rows, groups, d]."""
    rows = _rows(gradient)
    if rows.shape[1] != x.shape[1]:
        rows = rows.unflatten(1, (x.shape[1], -1)).sum(2)
    return rows


@cache
def flash_has_groups() -> bool:
    """Whether this torch's flash attention for CPUs takes fewer key heads than query heads.

    A version that does not would read the second head's keys: here they are NaN.
    """
    keys = torch.tensor([0.0, float("nan")]).view(1, 2, 1, 1)
    out, _ = _flash(torch.zeros(1, 2, 1, 1), keys[:, :1], keys[:, :1])
    return bool(torch.isfinite(out).all())
