"""silu(gate) · up and its gradient on a GPU, each in one pass over memory; in fp32, and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Values of a row that a program has in its registers at a time."""


@triton.jit
def _swiglu(x, grad, out, width, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    line = x + row * 2 * width + at
    gate = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(line + width, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    if BACKWARD:
        slope = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
        to_gate = slope * up * sigmoid * (1 + gate * (1 - sigmoid))
        to = out + row * 2 * width + at
        tl.store(to, to_gate.to(out.dtype.element_ty), mask=inside)
        tl.store(to + width, (slope * gate * sigmoid).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + row * width + at, (gate * sigmoid * up).to(out.dtype.element_ty), mask=inside)


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2F], gate and up side by side → silu(gate) · up, [..., F]."""
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
    return _launch(x, None, out)


def swiglu_back(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``swiglu``: x [..., 2F], grad [..., F] → [..., 2F]."""
    x, grad = x.contiguous(), grad.contiguous()
    return _launch(x, grad, torch.empty_like(x))


def _launch(x: Tensor, grad: Tensor | None, out: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    if x.numel():
        grid = (x.numel() // x.shape[-1], triton.cdiv(width, BLOCK))
        _swiglu[grid](x, grad, out, width, BACKWARD=grad is not None, BLOCK=BLOCK, num_warps=8)
    return out
