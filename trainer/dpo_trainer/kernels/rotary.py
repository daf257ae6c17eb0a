"""The rotary embedding on a GPU in one pass over memory, for keys together with their copies into a plan's rows.

torch's operations convert to fp32, multiply and convert back in passes of their own, and the copy is one more. Channel
i turns with channel i + r/2 by their angle in fp32, where r channels turn; those after them stay. In the backward pass,
a key's gradient is the fp32 sum over its copies in their order, turned back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(  # type: ignore[no-untyped-def] # noqa: PLR0917 - Triton's launcher passes them by position
    x,
    out,
    cosines,
    sines,
    starts,
    sources,
    direction,
    x_row,
    x_head,
    heads,
    half,
    still,
    SUMS: tl.constexpr,  # noqa: N803
    GATHERS: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    STILL: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (channel < half)
    place = head * x_head + channel
    width = 2 * half + still
    # The channels that stay: none of them, or a block.
    kept = tl.arange(0, STILL)[None, :]
    beyond = (head < heads) & (kept < still)
    kept_place = head * x_head + 2 * half + kept
    angle_row = row
    if SUMS:
        first = tl.zeros((HEADS, HALF), tl.float32)
        second = tl.zeros((HEADS, HALF), tl.float32)
        third = tl.zeros((HEADS, STILL), tl.float32)
        for copy in range(tl.load(starts + row), tl.load(starts + row + 1)):
            line = x + tl.load(sources + copy) * x_row
            first += tl.load(line + place, mask=inside, other=0.0).to(tl.float32)
            second += tl.load(line + place + half, mask=inside, other=0.0).to(tl.float32)
            third += tl.load(line + kept_place, mask=beyond, other=0.0).to(tl.float32)
    else:
        if GATHERS:
            angle_row = tl.load(sources + row)
        line = x + angle_row * x_row
        first = tl.load(line + place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(line + place + half, mask=inside, other=0.0).to(tl.float32)
        third = tl.load(line + kept_place, mask=beyond, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + angle_row * half + channel, mask=channel < half, other=0.0)
    sine = tl.load(sines + angle_row * half + channel, mask=channel < half, other=0.0) * direction
    line = out + row * heads * width + head * width
    to = line + channel
    tl.store(to, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(line + 2 * half + kept, third.to(out.dtype.element_ty), mask=beyond)


def turned(x: Tensor, cosines: Tensor, sines: Tensor, direction: int, keys: Tensor | None = None) -> Tensor:
    """x [S, heads, d] turned by its rows' angles: [S, heads, d], or with ``keys`` its rows [K] of them: [K, heads, d].

    cosines, sines: fp32 [S, 1, r / 2]. direction: 1, or -1 to turn back. Returns x's dtype.
    """
    return _launch(x, len(x) if keys is None else len(keys), cosines, sines, direction, sources=keys)


def turned_back(grad: Tensor, cosines: Tensor, sines: Tensor, starts: Tensor, copies: Tensor) -> Tensor:
    """The gradient of ``turned`` with keys: grad [K, heads, d] → [S, heads, d].

    starts [S + 1], copies [K]: the key rows that are copies of row s are copies[starts[s] : starts[s + 1]].
    """
    return _launch(grad, len(starts) - 1, cosines, sines, -1, sources=copies, starts=starts)


def _launch(
    x: Tensor,
    rows: int,
    cosines: Tensor,
    sines: Tensor,
    direction: int,
    *,
    sources: Tensor | None,
    starts: Tensor | None = None,
) -> Tensor:
    if x.stride(2) != 1:
        x = x.contiguous()
    heads, width = x.shape[1:]
    half = cosines.shape[-1]
    still = width - 2 * half
    out = torch.empty(rows, heads, width, dtype=x.dtype, device=x.device)
    if rows:
        _turn[(rows,)](
            x,
            out,
            cosines,
            sines,
            starts,
            sources,
            direction,
            x.stride(0),
            x.stride(1),
            heads,
            half,
            still,
            SUMS=starts is not None,
            GATHERS=sources is not None,
            HEADS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(half),
            STILL=triton.next_power_of_2(max(1, still)),
        )
    return out
