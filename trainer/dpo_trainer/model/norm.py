"""RMS norm for Megatron-Core's layer spec (Zhang & Sennrich, Root Mean Square Layer Normalization, 2019)."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from dpo_trainer import bridge


class RMSNorm(torch.nn.Module):
    """x · weight / √(mean(x²) + eps) over the last axis.

    Megatron-Core's own wrapper around torch refuses sequence parallelism; this one marks its weight, so that
    Megatron-Core sums the weight's gradient over the tensor-parallel ranks that each see a part of the sequence.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        place = torch.device("cpu") if config.use_cpu_initialization else bridge.device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=place))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; computed in fp32 inside the kernel, returned in x's dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
