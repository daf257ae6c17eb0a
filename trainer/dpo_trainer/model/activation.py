"""The MLP's activation in few passes over memory, and without what autograd would keep of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_trainer.kernels.usable import computes
from dpo_trainer.model.again import repeatable


class SwiGLU(torch.nn.Module):
    """silu(gate) · up (Shazeer, GLU Variants Improve Transformer, 2020). Built by the layer spec.

    Megatron-Core's own form keeps silu(gate) and a copy of up for the backward pass, and adds an offset of 0.
    """

    def __init__(self, config: Any) -> None:  # noqa: ARG002 - Megatron-Core's signature
        super().__init__()

    def forward(self, x: Tensor, /) -> Tensor:
        """x: [..., 2F], gate and up side by side. Returns [..., F]."""
        return repeatable(_SwiGLU.apply, x)


class GeGLU(torch.nn.Module):
    """gelu(gate) · up with GELU's tanh form (Shazeer, 2020; Hendrycks & Gimpel, 2016). Built by the layer spec."""

    def __init__(self, config: Any) -> None:  # noqa: ARG002 - Megatron-Core's signature
        super().__init__()

    def forward(self, x: Tensor, /) -> Tensor:
        """x: [..., 2F], gate and up side by side. Returns [..., F]."""
        return repeatable(_GeGLU.apply, x)


class SquaredReLU(torch.nn.Module):
    """max(x, 0)² (So et al., Primer, 2021). Built by the layer spec. Autograd keeps max(x, 0) alone."""

    def __init__(self, config: Any) -> None:  # noqa: ARG002 - Megatron-Core's signature
        super().__init__()

    def forward(self, x: Tensor, /) -> Tensor:
        """x: [..., F]. Returns [..., F]."""
        return repeatable(torch.square, F.relu(x))


class _Gated(torch.autograd.Function):
    """act(gate) · up. Saves its input alone; act(gate) is computed again."""

    act: Callable[[Tensor], Tensor]
    slope: Callable[..., Tensor]
    """(gradient, gate, grad_input=out): writes gradient · act'(gate)."""
    kernel = False
    """Whether Triton's kernels compute it on GPUs."""

    @classmethod
    def forward(cls, ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if cls.kernel and computes(x):
            from dpo_trainer.kernels import swiglu  # Triton, which comes with torch for GPUs

            return swiglu.swiglu(x)
        gate, up = x.chunk(2, dim=-1)
        return cls.act(gate).mul_(up)

    @classmethod
    @once_differentiable
    def backward(cls, ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if cls.kernel and computes(x):
            from dpo_trainer.kernels import swiglu

            return swiglu.swiglu_back(x, grad)
        gate, up = x.chunk(2, dim=-1)
        total = torch.empty_like(x)
        to_gate, to_up = total.chunk(2, dim=-1)
        torch.mul(cls.act(gate), grad, out=to_up)
        cls.slope(grad * up, gate, grad_input=to_gate)
        return total


class _SwiGLU(_Gated):
    kernel = True
    act = staticmethod(F.silu)
    slope = staticmethod(torch.ops.aten.silu_backward.grad_input)


class _GeGLU(_Gated):
    act = staticmethod(partial(F.gelu, approximate="tanh"))
    slope = staticmethod(partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"))
