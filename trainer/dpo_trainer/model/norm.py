"""The norms of Megatron-Core's layer spec.

Megatron-Core's own wrappers around torch refuse sequence parallelism; these mark their parameters, so that
Megatron-Core sums their gradients over the tensor-parallel ranks that each see a part of the sequence.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_trainer import bridge


class RMSNorm(torch.nn.Module):
    """x · weight / √(mean(x²) + eps) over the last axis (Zhang & Sennrich, 2019)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; computed in fp32 inside the kernel, returned in x's dtype."""
        if x.device.type == "cpu":
            out: Tensor = _OnCPU.apply(x, self.weight, self.eps)
            return out
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """(x - mean(x)) · weight / √(var(x) + eps) + bias over the last axis (Ba et al., 2016)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)
        self.bias = _parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; computed in fp32 inside the kernel, returned in x's dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class LayerNorm1P(LayerNorm):
    """LayerNorm whose weight is stored as the difference from 1: NeMo's layernorm1p."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; computed in fp32 inside the kernel, returned in x's dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight + 1, self.bias, self.eps)


def _parameter(config: Any, size: int, value: float) -> torch.nn.Parameter:
    place = torch.device("cpu") if config.use_cpu_initialization else bridge.device()
    parameter = torch.nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=place))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class _OnCPU(torch.autograd.Function):
    """torch has no kernel of it for CPUs: it composes one, which keeps x / rms and takes more passes over memory.

    Saves x, the weight and 1 / rms, one number for each row. With y = x · r · w, where r = (mean(x²) + eps)^-½:
    ∂w = Σ rows g · x · r, and ∂x = r · (g · w − x · r² · mean(g · w · x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows(x)
        scale = torch.linalg.vector_norm(rows, dim=1).square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (rows * scale[:, None]).mul_(weight.to(rows.dtype))
        return normed.to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        rows, slope = _rows(x), _rows(grad)
        wide = weight.to(rows.dtype)
        both = slope * rows
        to_weight = torch.mv(both.t(), scale).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None
        pull = torch.mv(both, wide).mul_(scale.pow(3)).div_(rows.shape[1])
        to_rows = torch.mul(slope, wide, out=both).mul_(scale[:, None]).addcmul_(rows, pull[:, None], value=-1)
        return to_rows.to(x.dtype).view(x.shape), to_weight, None


def _rows(x: Tensor) -> Tensor:
    """[..., H] as [rows, H], in fp32 or wider."""
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
