"""The norms of Megatron-Core's layer spec.

Megatron-Core's own wrappers around torch refuse sequence parallelism; these mark their parameters, so that
Megatron-Core sums their gradients over the tensor-parallel ranks that each see a part of the sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_trainer import bridge
from dpo_trainer.model.again import repeatable


class RMSNorm(torch.nn.Module):
    """x · weight / √(mean(x²) + eps) over the last axis (Zhang & Sennrich, 2019)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; computed in fp32 inside the kernel, returned in x's dtype."""
        return repeatable(lambda rows: _rms_norm(rows, self.weight, self.eps), x)


class RMSNorm1P(torch.nn.Module):
    """RMSNorm whose weight is stored as the difference from 1, to which it is added in fp32 (Gemma)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; computed in fp32, returned in x's dtype."""
        return repeatable(self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        # torch's kernel would take the factor in x's dtype, in which 1 + weight loses most of the weight.
        out: Tensor = _RMSNorm.apply(x, self.weight.float() + 1, self.eps, None)
        return out


class HeadsRMSNorm(torch.nn.Module):
    """RMSNorm over all of a token's query heads, or key heads, together (OLMo 2). Built by the layer spec.

    Every tensor-parallel rank holds the whole weight and uses the part of its own heads. Megatron-Core sums the
    gradients of q_layernorm and k_layernorm over the ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, *, heads: int) -> None:
        super().__init__()
        self.eps, self.heads = eps, heads
        self.weight = _parameter(config, heads * hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [S, 1, heads of this rank, head_dim]; the mean square is over the heads of all ranks."""
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size == 1:
            return _rms_norm(x.flatten(2), self.weight, self.eps).view(x.shape)
        own, width = x.shape[2:]
        first = parallel_state.get_tensor_model_parallel_rank() * self.heads // size
        weight = self.weight.view(self.heads, width)[first : first + own].flatten()
        shared = _Shared(self.heads * width, own * size // self.heads, parallel_state.get_tensor_model_parallel_group())
        out: Tensor = _RMSNorm.apply(x.flatten(2), weight, self.eps, shared)
        return out.view(x.shape)


class LayerNorm(torch.nn.Module):
    """(x - mean(x)) · weight / √(var(x) + eps) + bias over the last axis (Ba et al., 2016)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)
        self.bias = _parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; computed in fp32 inside the kernel, returned in x's dtype."""
        return repeatable(self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class LayerNorm1P(LayerNorm):
    """LayerNorm whose weight is stored as the difference from 1: NeMo's layernorm1p."""

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight + 1, self.bias, self.eps)


def _parameter(config: Any, size: int, value: float) -> torch.nn.Parameter:
    place = torch.device("cpu") if config.use_cpu_initialization else bridge.device()
    parameter = torch.nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=place))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type == "cpu":
        out: Tensor = _RMSNorm.apply(x, weight, eps, None)
        return out
    return F.rms_norm(x, weight.shape, weight, eps)


@dataclass(frozen=True)
class _Shared:
    """How tensor-parallel ranks share the rows of a norm."""

    width: int  #: channels of a whole row
    copies: int  #: ranks that hold the same channels, where there are more ranks than key heads
    group: Any


class _RMSNorm(torch.autograd.Function):
    """torch has no kernel of it for CPUs: it composes one, which keeps x / rms and takes more passes over memory.

    Saves x, the weight and 1 / rms, one number for each row. With y = x · r · w, where r = (mean(x²) + eps)^-½:
    ∂w = Σ rows g · x · r, and ∂x = r · (g · w − x · r² · mean(g · w · x)). Of a row that ranks share, each has a
    part of x and of g, and both means are sums over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, shared: _Shared | None) -> Tensor:
        rows = _rows(x)
        ctx.shared = shared
        scale = _mean(torch.linalg.vector_norm(rows, dim=1).square_(), rows.shape[1], shared).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (rows * scale[:, None]).mul_(weight.to(rows.dtype))
        return normed.to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        rows, slope = _rows(x), _rows(grad)
        wide = weight.to(rows.dtype)
        both = slope * rows
        to_weight = torch.mv(both.t(), scale).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None, None
        pull = _mean(torch.mv(both, wide), rows.shape[1], ctx.shared).mul_(scale.pow(3))
        to_rows = torch.mul(slope, wide, out=both).mul_(scale[:, None]).addcmul_(rows, pull[:, None], value=-1)
        return to_rows.to(x.dtype).view(x.shape), to_weight, None, None


def _mean(sums: Tensor, width: int, shared: _Shared | None) -> Tensor:
    """Divide the rows' sums by their width, in place; of rows that ranks share, first add the ranks' sums."""
    if shared is None:
        return sums.div_(width)
    dist.all_reduce(sums, group=shared.group)
    return sums.div_(shared.width * shared.copies)


def _rows(x: Tensor) -> Tensor:
    """[..., H] as [rows, H], in fp32 or wider."""
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
