"""Log-probabilities of response tokens from hidden states, without ever storing a [rows, vocabulary] matrix.

With a vocabulary of 128k, the logits of 8,192 tokens take 4 GiB in fp32, and autograd keeps several such tensors. Here
the LM head is part of the function: it processes the rows in chunks, keeps one number per row (the log of the softmax's
denominator) and recomputes each chunk's logits in the backward pass. This costs one more GEMM of the head.

Only rows that predict a response token are passed in; prompts and padding never go through the LM head.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Maximum size of one chunk's fp32 logits, which sets the default chunk. Peak memory is about twice this."""


def default_chunk(rows: int, vocabulary: int) -> int:
    """Return the rows per chunk whose fp32 logits take at most CHUNK_BYTES: ⌊64 MiB / (4 B · vocabulary)⌋, at least 1.

    524 rows for a vocabulary of 32,000, 130 for 128,256; ``vocabulary`` is this rank's part of it. Chunks have equal
    sizes, because the GEMMs of a small last chunk would be inefficient.
    """
    most = max(1, CHUNK_BYTES // (4 * max(1, vocabulary)))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def response_log_probs(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """log softmax(rows · weightᵀ)[label] of every row.

    rows: [R, H] hidden states after the final norm. weight: [V, H], the LM head, in the rows' dtype; with ``tp_group``
    this rank's [V / T, H] slice, rank t holding the vocabulary from t·V/T on. labels: [R] int64. chunk: rows whose
    logits exist at the same time (None: ``default_chunk``); it changes the result only by rounding. vocabulary: its
    real size, if V was padded to a multiple of T; the rows of ``weight`` from there on take no part.

    Returns [R] in fp32 (float64 for float64 rows), equal on all ranks of ``tp_group``: logits in the rows' dtype, the
    softmax in fp32. Gradients: of rows, complete on each rank (summed over ``tp_group`` here); of weight, this rank's
    slice, summed over chunks in fp32 and returned once in the weight's dtype, as an ordinary gradient. Hooks on the
    parameter (Megatron-Core's main_grad, tied embeddings) therefore work as usual, and a frozen weight costs nothing.

    Raises ValueError for shapes that do not match, and IndexError for a label outside the vocabulary on CPU. On an
    accelerator this check would wait for the device; there the log-probability is NaN and the run's check for finite
    losses stops it.
    """
    if rows.dim() != 2 or weight.dim() != 2 or rows.shape[1] != weight.shape[1] or labels.shape != rows.shape[:1]:
        raise ValueError(
            "shapes are not [R, H], [V, H], [R]: "
            f"rows {list(rows.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)}"
        )
    if rows.dtype != weight.dtype:
        raise ValueError(f"rows are {rows.dtype} and the LM head {weight.dtype}: cast one of them")
    if chunk is None:
        chunk = default_chunk(rows.shape[0], weight.shape[0])
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: at least one row is needed")
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    shards = 1 if tp_group is None else tp_group.size()
    if vocabulary is None:
        vocabulary = weight.shape[0] * shards
    if labels.numel() and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise IndexError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, the vocabulary from 0 to {vocabulary - 1}"
        )
    result: Tensor = _ResponseLogProbs.apply(rows, weight, labels, chunk, tp_group, vocabulary)
    return result


def sums_by_owner(
    log_probs: Tensor, owners: Tensor, n_owners: int, *, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Sum the tokens of each response.

    log_probs: [R]. owners: [R] int64 in [0, n_owners), each token's response. group: the ranks that have tokens of
    these responses, where it is not this one alone; the gradient of the sums then goes to each rank's own tokens.
    Returns the sums [n_owners] in float64, with gradient, and the counts [n_owners] int64, equal on all ranks of
    ``group``. The sums are float64 because their differences are used: see losses.pair_losses. A response without
    tokens has sum 0 and count 0.
    """
    sums = torch.zeros(n_owners, dtype=torch.float64, device=log_probs.device).index_add(0, owners, log_probs.double())
    counts = torch.bincount(owners, minlength=n_owners)
    if group is None or group.size() == 1:
        return sums, counts
    sums, of_all = _SumOverRanks.apply(torch.stack((sums, counts.double())), group)
    return sums, of_all.detach().long()


class _SumOverRanks(torch.autograd.Function):
    """The sum over a group. Each rank computes the whole gradient of the sum, which is that of its own term."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ResponseLogProbs(torch.autograd.Function):
    """See response_log_probs. Saves the inputs, which exist anyway, and one number per row for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        tp_group: dist.ProcessGroup | None,
        vocabulary: int,
    ) -> Tensor:
        first = 0 if tp_group is None else tp_group.rank() * weight.shape[0]
        real = min(weight.shape[0], max(0, vocabulary - first))  # rows of this rank's slice that are no padding
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        # For every row, over this rank's part of the vocabulary: [R] each.
        peak = torch.empty(rows.shape[0], dtype=dtype, device=rows.device)
        mass = torch.empty_like(peak)  # Σ exp(logit − peak)
        target = torch.empty_like(peak)  # the label's logit; 0 where another rank holds it
        owned = torch.empty_like(peak)  # 1 where this rank holds the label
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = _logits(rows[part], weight, dtype, real)  # [C, V / T]
            index, inside = _local(labels[part], first, weight.shape[0])
            owned[part] = inside
            target[part] = logits.gather(1, index.unsqueeze(1)).squeeze(1) * inside
            peak[part] = logits.amax(1).clamp_(min=torch.finfo(dtype).min)  # a slice may be padding alone
            mass[part] = logits.sub_(peak[part].unsqueeze(1)).exp_().sum(1)
            del logits  # before the next chunk's are made
        if tp_group is not None:
            # Two reductions for the whole batch instead of two per chunk.
            shared = peak.clone()
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=tp_group)
            parts = torch.stack((mass * (peak - shared).exp(), target, owned))
            dist.all_reduce(parts, dist.ReduceOp.SUM, group=tp_group)
            peak, (mass, target, owned) = shared, parts.unbind()
        log_mass = peak + mass.log()  # log Σ exp(logit)
        ctx.save_for_backward(rows, weight, labels, log_mass)
        ctx.chunk, ctx.tp_group, ctx.first, ctx.real = chunk, tp_group, first, real
        return torch.where(owned == 1, target - log_mass, torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """∂ log p(label) / ∂ logit_v = [v = label] − p(v), chunk by chunk."""
        rows, weight, labels, log_mass = ctx.saved_tensors
        need_rows, need_weight = ctx.needs_input_grad[:2]
        rows_grad = torch.empty_like(rows) if need_rows else None
        # A single chunk needs no fp32 sum: its GEMM rounds once, at the end.
        single = ctx.chunk >= rows.shape[0] > 0
        sum_dtype = weight.dtype if single else log_mass.dtype
        weight_grad = torch.zeros_like(weight, dtype=sum_dtype) if need_weight else None
        for start in range(0, rows.shape[0] if need_rows or need_weight else 0, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            slope = _logits(rows[part], weight, log_mass.dtype, ctx.real)  # [C, V / T], in place from here on
            slope.sub_(log_mass[part].unsqueeze(1)).exp_().neg_()
            index, inside = _local(labels[part], ctx.first, weight.shape[0])
            slope.scatter_add_(1, index.unsqueeze(1), inside.unsqueeze(1).to(slope.dtype))
            slope = slope.mul_(grad[part].unsqueeze(1)).to(rows.dtype)
            if rows_grad is not None:
                torch.mm(slope, weight, out=rows_grad[part])
            if weight_grad is not None:
                _add_product(weight_grad, slope, rows[part])
            del slope
        if rows_grad is not None and ctx.tp_group is not None:
            dist.all_reduce(rows_grad, dist.ReduceOp.SUM, group=ctx.tp_group)
        return rows_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None, None, None


def _logits(rows: Tensor, weight: Tensor, dtype: torch.dtype, real: int) -> Tensor:
    """[C, H], [V, H] -> new [C, V] in ``dtype``, first rounded to the rows' dtype as in every LM head.

    Columns from ``real`` on are padding: -inf, so that their probability and their gradient are 0.
    """
    logits = (rows @ weight.t()).to(dtype)
    logits[:, real:] = -torch.inf
    return logits


def _local(labels: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Labels [C] as indices into this rank's slice of the vocabulary (0 if outside), and whether they are inside."""
    inside = (labels >= first) & (labels < first + size)
    return torch.where(inside, labels - first, 0), inside


def _add_product(total: Tensor, slope: Tensor, rows: Tensor) -> None:
    """total [V, H] += slopeᵀ [V, C] · rows [C, H], where total is fp32 and the operands may be bf16."""
    if slope.dtype == total.dtype:
        total.addmm_(slope.t(), rows)
        return
    # The product exists in bf16 before it is added, so it is computed in blocks: else it would be a second [V, H].
    block = max(1, CHUNK_BYTES // (2 * total.shape[1]))
    for start in range(0, total.shape[0], block):
        total[start : start + block].add_(slope[:, start : start + block].t() @ rows)
