"""Log-probabilities of response tokens from hidden states, with a bound on what the LM head keeps.

With a vocabulary of 128k, the logits of 8,192 tokens take 4 GiB in fp32, and autograd keeps several such tensors. Here
the LM head is part of the function. For its backward pass it keeps one matrix of the rows' dtype, which the logits are
turned into in place, for as many rows as a budget of bytes allows. It recomputes the logits of the other rows chunk by
chunk, which costs one more GEMM for them. If the head is frozen, the forward pass computes the gradient of the rows up
to a factor for each row, and nothing is kept or recomputed.

With peak a row's largest logit and mass = Σ exp(logit − peak), the kept matrix m is exp(logit − peak), less the mass at
the label. Since ∂ log p(label) / ∂ logit_v = [v = label] − p(v) = −m_v / mass, backward is two GEMMs, and the incoming
gradient scales [R, H] values, not [R, V].

On a GPU the softmax is two kernels of Triton (``kernels.head``), and torch's operations elsewhere.

Only rows that predict a response token are passed in; prompts and padding never go through the LM head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_api.sizing.head import (
    ALIGNMENT,
    CPU_BLOCK_BYTES,
    CPU_BUDGET_BYTES,
    GPU_BLOCK_BYTES,
    GPU_BUDGET_BYTES,
    HeadChunks,
    head_chunks,
)
from dpo_trainer.kernels.usable import computes
from dpo_trainer.products import add_product, hand_over, main_grad_of


def response_log_probs(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunks: HeadChunks | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """log softmax(rows · weightᵀ)[label] of every row.

    rows: [R, H] hidden states after the final norm. weight: [V, H], the LM head, in the rows' dtype; with ``tp_group``
    this rank's [V / T, H] slice, rank t holding the vocabulary from t·V/T on. labels: [R] int64. chunks: which
    rows are kept for backward, and which are computed again (None: ``head_chunks`` for the device's budget); this
    changes the result only by rounding. vocabulary: its real size, if V was padded to a multiple of T; the rows of
    ``weight`` from there on take no part.

    Returns [R] in fp32 (float64 for float64 rows), equal on all ranks of ``tp_group``: logits in the rows' dtype, the
    softmax in fp32. Gradients: of rows, complete on each rank (summed over ``tp_group`` here); of weight, this rank's
    slice, summed over chunks in fp32. If the weight has Megatron-Core's fp32 ``main_grad``, it is added there, by the
    GEMM itself (see ``products.hand_over``); if not, it is returned in the weight's dtype.

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
    differentiable = torch.is_grad_enabled()
    if chunks is None:
        budget = CPU_BUDGET_BYTES if rows.device.type == "cpu" else GPU_BUDGET_BYTES
        keep = differentiable and weight.requires_grad
        chunks = head_chunks(rows.shape[0], weight.shape[0], rows.element_size(), budget, keep=keep)
    if chunks.kept < rows.shape[0] and chunks.size < 1:
        raise ValueError(f"a chunk has {chunks.size} rows: at least one is needed")
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    shards = 1 if tp_group is None else tp_group.size()
    if vocabulary is None:
        vocabulary = weight.shape[0] * shards
    if labels.numel() and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise IndexError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, the vocabulary from 0 to {vocabulary - 1}"
        )
    first = 0 if tp_group is None else tp_group.rank() * weight.shape[0]
    columns = min(weight.shape[0], max(0, vocabulary - first))
    result: Tensor = _ResponseLogProbs.apply(
        rows, weight, labels, chunks, _Shard(first, columns, tp_group), differentiable
    )
    return result


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the vocabulary: the ids from ``first`` on. ``columns`` of them are no padding."""

    first: int
    columns: int
    group: dist.ProcessGroup | None

    @property
    def width(self) -> int:
        """Columns that are computed: one at least, because torch has no largest number of none."""
        return max(1, self.columns)

    def of(self, table: Tensor) -> Tensor:
        """The rows [columns, H] of a table [V / T, H] that are no padding."""
        return table[: self.width]

    def local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [C] as columns of this part, [C, 1] (0 if outside), and whether they are inside, [C]."""
        inside = (labels >= self.first) & (labels < self.first + self.columns)
        return torch.where(inside, labels - self.first, 0).unsqueeze(1), inside

    def reduce(self, values: Tensor, operation: Any) -> None:
        """Reduce over the ranks that share the vocabulary, in place."""
        if self.group is not None:
            dist.all_reduce(values, operation, group=self.group)


class _ResponseLogProbs(torch.autograd.Function):
    """See response_log_probs. "The matrix" is that of m, see the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunks: HeadChunks,
        shard: _Shard,
        differentiable: bool,
    ) -> Tensor:
        need_rows, need_weight = (needed and differentiable for needed in ctx.needs_input_grad[:2])
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        log_probs, peak, mass = (torch.empty(rows.shape[0], dtype=dtype, device=rows.device) for _ in range(3))
        # Of a frozen head, the gradient of the rows is known up to a factor: that of the matrix times the head.
        product = torch.empty_like(rows) if need_rows and not need_weight else None
        kept, spare = None, None
        for start, stop in chunks.parts(rows.shape[0]):
            part = slice(start, stop)
            keep = need_weight and stop <= chunks.kept
            matrix = _logits(rows[part], weight, shard, spare)
            figures = _softmax(matrix, labels[part], shard, slope=keep or product is not None)
            log_probs[part], peak[part], mass[part] = figures
            if product is not None:
                torch.mm(matrix, shard.of(weight), out=product[part])
            kept, spare = (matrix, None) if keep else (kept, matrix)
        if product is None:
            ctx.save_for_backward(mass, product, rows, weight, labels, peak, kept)
        else:
            ctx.save_for_backward(mass, product)
        ctx.chunks, ctx.shard = chunks, shard
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        need_rows, need_weight = ctx.needs_input_grad[:2]
        mass, product, *others = ctx.saved_tensors
        scale = grad.div(mass).neg_().unsqueeze(1)  # of each row of the matrix
        rows_grad, weight_grad = None, None
        if need_weight:
            product, weight_grad = _products(ctx.chunks, ctx.shard, mass, scale, *others, need_rows=need_rows)
        if need_rows:
            rows_grad = torch.mul(product, scale, out=torch.empty_like(product))
            ctx.shard.reduce(rows_grad, dist.ReduceOp.SUM)
        return rows_grad, weight_grad, None, None, None, None


def _products(
    chunks: HeadChunks,
    shard: _Shard,
    mass: Tensor,
    scale: Tensor,
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    peak: Tensor,
    kept: Tensor | None,
    *,
    need_rows: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The matrix times the head, [R, H], if wanted, and the head's gradient: matrixᵀ times the scaled rows, [V, H].

    None in place of a gradient that was added to ``main_grad``.
    """
    parts = chunks.parts(rows.shape[0])
    product = torch.empty_like(rows) if need_rows else None
    total = main_grad = main_grad_of(weight)
    if total is None:
        # A single part needs no fp32 sum: its GEMM rounds once, at the end.
        total = torch.empty_like(weight, dtype=weight.dtype if len(parts) == 1 else mass.dtype)
        total[shard.width if parts else 0 :].zero_()
    spare = None
    for start, stop in parts:
        part = slice(start, stop)
        if kept is not None and stop <= chunks.kept:
            matrix = kept
        else:
            matrix = spare = _logits(rows[part], weight, shard, spare)
            _slope(matrix, labels[part], shard, peak[part], mass[part])
        if product is not None:
            torch.mm(matrix, shard.of(weight), out=product[part])
        first = main_grad is None and start == 0
        add_product(shard.of(total), matrix, (rows[part] * scale[part]).to(rows.dtype), first=first)
    if main_grad is not None:
        hand_over(weight)
        return product, None
    return product, total.to(weight.dtype)


def _logits(rows: Tensor, weight: Tensor, shard: _Shard, spare: Tensor | None) -> Tensor:
    """[C, H], [V, H] -> [C, columns] in the rows' dtype, as in every LM head; in ``spare`` if that is given.

    Each row begins at a multiple of ALIGNMENT values. A part of the vocabulary that is padding alone gives one column
    of -inf, so that its probability and its gradient are 0.
    """
    if spare is None:
        wide = ALIGNMENT * -(-shard.width // ALIGNMENT)
        whole = torch.empty(rows.shape[0], wide, dtype=rows.dtype, device=rows.device)
        # A GEMM of bf16 on CPUs with AMX multiplies what follows a row's end by 0: a NaN there would spread.
        whole[:, shard.width :].zero_()
        spare = whole[:, : shard.width]
    logits = torch.mm(rows, shard.of(weight).t(), out=spare[: rows.shape[0]])
    return logits if shard.columns else logits.fill_(-torch.inf)


def _softmax(logits: Tensor, labels: Tensor, shard: _Shard, *, slope: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The label's log-probability, the largest logit and Σ exp(logit − peak) over the whole vocabulary, [C] each.

    If ``slope``, the logits become the matrix; if not, they may become anything.
    """
    index, inside = shard.local(labels)
    if computes(logits):
        from dpo_trainer.kernels import head  # Triton, which comes with torch for GPUs

        highest, mass, target = head.statistics(logits, torch.where(inside, index.squeeze(1), -1))
        peak = highest.clone()
        shard.reduce(peak, dist.ReduceOp.MAX)
        mass *= (highest - peak).exp_()
    else:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        target = logits.gather(1, index).squeeze(1).to(dtype)
        peak = logits.amax(1).to(dtype)
        shard.reduce(peak, dist.ReduceOp.MAX)
        mass = _exponentiate(logits, peak, keep=slope)
    figures = torch.stack((torch.where(inside, target - peak, 0), inside.to(peak.dtype), mass))
    shard.reduce(figures, dist.ReduceOp.SUM)
    target, owned, mass = figures.unbind()
    if slope:
        if computes(logits):
            _slope(logits, labels, shard, peak, mass)
        else:
            _subtract_mass(logits, labels, shard, mass)
    return torch.where(owned == 1, target - mass.log(), torch.nan), peak, mass


def _slope(logits: Tensor, labels: Tensor, shard: _Shard, peak: Tensor, mass: Tensor) -> None:
    """Turn logits into the matrix, in place, where ``peak`` and ``mass`` are known."""
    if computes(logits):
        from dpo_trainer.kernels import head

        index, inside = shard.local(labels)
        head.slope_in_place(logits, torch.where(inside, index.squeeze(1), -1), peak, mass)
    else:
        _exponentiate(logits, peak, keep=True)
        _subtract_mass(logits, labels, shard, mass)


def _exponentiate(logits: Tensor, peak: Tensor, *, keep: bool) -> Tensor:
    """logits [C, V] -> exp(logit − peak), in place if ``keep``; returns the sums of its rows, [C].

    In fp32 (float64 for float64) and in blocks of a few rows, each of which stays in a cache from one operation to the
    next.
    """
    mass = torch.empty_like(peak)
    block = (CPU_BLOCK_BYTES if logits.device.type == "cpu" else GPU_BLOCK_BYTES) // (4 * logits.shape[1])
    for start in range(0, logits.shape[0], max(1, block)):
        part = slice(start, start + max(1, block))
        narrow, peaks = logits[part], peak[part].unsqueeze(1)
        exps = narrow.sub_(peaks) if narrow.dtype == peak.dtype else narrow - peaks
        torch.sum(exps.exp_(), 1, out=mass[part])
        if keep and exps is not narrow:
            narrow.copy_(exps)
    return mass


def _subtract_mass(exps: Tensor, labels: Tensor, shard: _Shard, mass: Tensor) -> None:
    """exp(logit − peak) -> −mass · ∂ log p / ∂ logit, in place: less the mass, in fp32, at the label."""
    index, inside = shard.local(labels)
    exps.scatter_(1, index, (exps.gather(1, index) - torch.where(inside, mass, 0).unsqueeze(1)).to(exps.dtype))


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
    # Not bincount, which reads the largest owner on the host.
    counts = torch.zeros(n_owners, dtype=torch.int64, device=owners.device).index_add(
        0, owners, torch.ones_like(owners)
    )
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
