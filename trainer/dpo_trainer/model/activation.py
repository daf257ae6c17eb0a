"""The MLP's activation in few passes over memory, and without what autograd would keep of it."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_trainer.kernels.usable import computes


class SwiGLU(torch.nn.Module):
    """silu(gate) · up (Shazeer, GLU Variants Improve Transformer, 2020). Built by the layer spec.

    Megatron-Core's own form keeps silu(gate) and a copy of up for the backward pass, and adds an offset of 0.
    """

    def __init__(self, config: Any) -> None:  # noqa: ARG002 - Megatron-Core's signature
        super().__init__()

    def forward(self, x: Tensor, /) -> Tensor:
        """x: [..., 2F], gate and up side by side. Returns [..., F]."""
        out: Tensor = _SwiGLU.apply(x)
        return out


class SquaredReLU(torch.nn.Module):
    """max(x, 0)² (So et al., Primer, 2021). Built by the layer spec. Autograd keeps max(x, 0) alone."""

    def __init__(self, config: Any) -> None:  # noqa: ARG002 - Megatron-Core's signature
        super().__init__()

    def forward(self, x: Tensor, /) -> Tensor:
        """x: [..., F]. Returns [..., F]."""
        return F.relu(x).square()


class _SwiGLU(torch.autograd.Function):
    """Saves its input alone; silu(gate) is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if computes(x):
            from dpo_trainer.kernels import swiglu  # Triton, which comes with torch for GPUs

            return swiglu.swiglu(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if computes(x):
            from dpo_trainer.kernels import swiglu

            return swiglu.swiglu_back(x, grad)
        gate, up = x.chunk(2, dim=-1)
        total = torch.empty_like(x)
        to_gate, to_up = total.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return total
