"""What FlashAttention documents of its functions for sequences of unlike lengths, with torch's signatures, on the CPU.

Each query i of a sequence of L queries and K keys sees the keys j with i + K - L - left ≤ j ≤ i + K - L + right (Dao,
FlashAttention 2.1 and 2.3: masks are aligned to the lower right corner); -1 is no bound. Rows of the output that no
sequence covers are never written: here they are NaN. Autograd differentiates it, in the inputs' own precision.
"""

from itertools import pairwise

import torch
from torch import Tensor

NO_BOUND = -1


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (NO_BOUND, NO_BOUND),
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn of torch 2.12 and later."""
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"{query.shape[1]} query heads and {key.shape[1]} key heads: enable_gqa is missing")
    return without_head_check(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale, window_size=window_size
    )


def without_head_check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (NO_BOUND, NO_BOUND),
) -> Tensor:
    """The same function of torch 2.11: it has no parameter for fewer key heads, and takes them."""
    assert return_aux is None
    bounds = [_bounds(cu_seq_q, len(query), max_q), _bounds(cu_seq_k, len(key), max_k)]
    assert len(bounds[0]) == len(bounds[1])
    assert key.shape == value.shape
    times, rest = divmod(query.shape[1], key.shape[1])
    assert rest == 0
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = torch.full_like(query, float("nan"))
    for (a, b), (c, d) in zip(*bounds, strict=True):
        k, v = (x[c:d].repeat_interleave(times, 1) for x in (key, value))
        last = torch.arange(b - a)[:, None] + (d - c) - (b - a)  # the key at a query's own place
        column = torch.arange(d - c)[None, :]
        left, right = (d - c if side == NO_BOUND else side for side in window_size)
        seen = (column >= last - left) & (column <= last + right)
        scores = torch.einsum("qhd,khd->hqk", query[a:b], k) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out = out.index_copy(0, torch.arange(a, b), torch.einsum("hqk,khd->qhd", weights, v))
    return out


def _bounds(cumulative: Tensor, rows: int, longest: int) -> list[tuple[int, int]]:
    """The rows of each sequence; refuses what the kernel would read or write beyond."""
    assert cumulative.dtype == torch.int32
    assert cumulative.is_contiguous()
    ends = cumulative.tolist()
    assert ends[0] == 0
    assert ends[-1] <= rows
    found = list(pairwise(ends))
    assert all(a < b for a, b in found)
    assert max(b - a for a, b in found) == longest
    return found
