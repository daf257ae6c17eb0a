"""softmax(QKᵀ/√d)V for each sequence of a plan. Nothing of size queries · keys is stored, except a window's mask.

On the CPU one autograd function calls torch's flash attention for CPUs, which has no causal mask aligned to the lower
right corner: ``scaled_dot_product_attention`` would take its quadratic form. The keys before the queries' own and the
queries' own keys are two calls, merged by their log-sum-exp. FlashAttention's backward pass needs only the output and
the log-sum-exp of the whole row (Dao et al., FlashAttention, 2022, algorithm 4), so two calls with the merged ones give
the gradients of the whole.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from dpo_trainer.model.varlen import Interval, VarlenPlan

Masks = Sequence[Tensor | None]
"""For each sequence: None for causal, or what is added to the scores, [L, K] in the queries' dtype."""


def window_mask(queries: int, keys: int, window: int, like: Tensor) -> Tensor | None:
    """What is added to a sequence's scores when each query sees itself and the ``window`` - 1 keys before it.

    Returns [queries, keys], 0 or -inf, of ``like``'s dtype and device; None if no query has more keys than that.
    """
    if keys <= window:
        return None
    before = keys - queries
    rows = torch.arange(before, keys, device=like.device)[:, None]
    columns = torch.arange(keys, device=like.device)[None, :]
    visible = (columns <= rows) & (rows - columns < window)
    # GPU kernels read rows that start at multiples of 8 elements; others are copied at every call.
    mask = like.new_zeros(queries, -(-keys // 8) * 8)[:, :keys]
    return mask.masked_fill_(~visible, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, masks: Masks, scale: float | None) -> Tensor:
    """Attend within each sequence of the plan.

    query: [S, heads, d]; key, value: [K, groups, d], the plan's key rows. scale: of the scores, None for 1/√d.
    Returns [S, heads · d], zero for padding.
    """
    if query.device.type == "cpu":
        out: Tensor = _OnCPU.apply(query, key, value, plan, masks, scale)
        return out
    return attend_by_piece(query, key, value, plan, masks, scale)


def attend_by_piece(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, masks: Masks, scale: float | None
) -> Tensor:
    """Do what ``attend`` does with one call of ``scaled_dot_product_attention`` a sequence, for GPUs."""
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


def _call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One sequence: query [L, heads, d]; key, value [K, groups, d]. Returns [L, heads · d]."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and (mask is not None or query.dtype == torch.float32):
        # Only the flash kernel has groups, and it takes neither masks nor fp32.
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        grouped = False
    bias = causal_lower_right(query.shape[0], key.shape[0]) if mask is None else mask
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
        groups = key.shape[1]
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        sums: list[Tensor] = []
        for rows, keys, own, mask in _sequences(plan, masks):
            q = _grouped(query, rows, groups)
            found, lse = _flash(q, *_shared(key, value, own, q), 0.0, mask is None, attn_mask=mask, scale=scale)
            if own[0] > keys[0]:
                before, lse_before = _flash(q, *_shared(key, value, (keys[0], own[0]), q), scale=scale)
                both = torch.logaddexp(lse_before, lse)
                found = torch.lerp(
                    found.to(both.dtype), before.to(both.dtype), (lse_before - both).exp_().unsqueeze(-1)
                )
                lse = both
            _grouped(out, rows, groups).copy_(found)
            sums.append(lse)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.plan, ctx.masks, ctx.scale = plan, masks, scale
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        groups = key.shape[1]
        grad = grad.contiguous().view(query.shape)
        to_query, to_key, to_value = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        for (rows, keys, own, mask), lse in zip(_sequences(ctx.plan, ctx.masks), sums, strict=True):
            q, o, g = (_grouped(x, rows, groups) for x in (query, out, grad))
            parts = [(own, mask is None)] + ([((keys[0], own[0]), False)] if own[0] > keys[0] else [])
            for part, causal in parts:
                k, v = _shared(key, value, part, q)
                dq, dk, dv = _flash_backward(g, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=ctx.scale)
                _grouped(to_query, rows, groups).add_(dq)
                to_key[part[0] : part[1]] = dk.sum(0).transpose(0, 1)
                to_value[part[0] : part[1]] = dv.sum(0).transpose(0, 1)
        return to_query, to_key, to_value, None, None, None


def _sequences(plan: VarlenPlan, masks: Masks) -> list[tuple[Interval, Interval, Interval, Tensor | None]]:
    """Each sequence but padding: its query rows, its key rows, those of them that are one causal call, its mask.

    A mask covers all keys, so they are one call.
    """
    cu_q, cu_k = plan.cu_q.tolist(), plan.cu_k.tolist()
    found: list[tuple[Interval, Interval, Interval, Tensor | None]] = []
    for index, (piece, mask) in enumerate(zip(plan.pieces, masks, strict=True)):
        if piece.padding:
            continue
        rows, keys = (cu_q[index], cu_q[index + 1]), (cu_k[index], cu_k[index + 1])
        own = (keys[1] - piece.length, keys[1]) if mask is None else keys
        found.append((rows, keys, own, mask))
    return found


def _grouped(x: Tensor, rows: Interval, groups: int) -> Tensor:
    """A view of [S, heads, d]'s rows as [heads / groups, groups, L, d].

    The heads that share keys become the batch, so that keys are expanded by a stride of 0 and not copied.
    """
    part = x[rows[0] : rows[1]]
    return part.view(part.shape[0], groups, -1, part.shape[2]).permute(2, 1, 0, 3)


def _shared(key: Tensor, value: Tensor, rows: Interval, query: Tensor) -> tuple[Tensor, Tensor]:
    """Views of [K, groups, d]'s rows as [heads / groups, groups, rows, d]."""
    k, v = (x[rows[0] : rows[1]].transpose(0, 1).expand(query.shape[0], -1, -1, -1) for x in (key, value))
    return k, v
