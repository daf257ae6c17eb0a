"""The fp32 master weights that Adam updates; the model computes with bf16 copies.

Megatron-Core keeps them in the optimizer. Its plain optimizer has whole parameters on every rank; the distributed one
has a range of each flattened parameter on each data-parallel rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PIECE = 1 << 26
"""Elements gathered at once: 256 MiB in addition to what training holds on the device."""


class Masters:
    """The masters of one optimizer's parameters. A parameter without a master is its own master."""

    def __init__(self, optimizer: Any) -> None:
        self._parts = getattr(optimizer, "chained_optimizers", [optimizer])

    @torch.no_grad()
    def whole(self, parameter: Tensor, to: int | None = None) -> Tensor | None:
        """Return the exact master of a parameter (of this rank's tensor-parallel part) on one data-parallel rank.

        With the distributed optimizer, a collective over the data-parallel group. to: the rank in this group that gets
        the value, the same on all of them; the others get None. Without it, all get the value.
        """
        if not _has_master(parameter):
            return parameter.detach()
        if not getattr(parameter, "main_param_sharded", False):
            main: Tensor = _main(parameter).detach()
            return main.view(parameter.shape)
        group, start, end = self._range(parameter)
        found = torch.empty(parameter.numel()) if to in (None, dist.get_rank(group)) else None
        for first in range(0, parameter.numel(), _PIECE):
            last = min(first + _PIECE, parameter.numel())
            # The ranges are disjoint, so summing bit patterns as integers keeps each value exactly, also -0.0 and NaN.
            bits = torch.zeros(last - first, dtype=torch.int32, device=parameter.device)
            low, high = max(first, start), min(last, end)
            if low < high:
                own = _main(parameter).detach().view(-1)[low - start : high - start]
                bits[low - first : high - first] = own.view(torch.int32)
            if to is None:
                dist.all_reduce(bits, group=group)
            else:
                dist.reduce(bits, dst=dist.get_global_rank(group, to), group=group)
            if found is not None:
                found[first:last] = bits.view(torch.float32).cpu()
        return None if found is None else found.view(parameter.shape)

    @torch.no_grad()
    def fill(self, parameter: Tensor, value: Tensor) -> None:
        """Set the master to ``value``, which has the parameter's shape, instead of the rounded parameter."""
        if not _has_master(parameter):
            return
        start, end = 0, parameter.numel()
        if getattr(parameter, "main_param_sharded", False):
            _, start, end = self._range(parameter)
        if start < end:
            _main(parameter).view(-1).copy_(value.reshape(-1)[start:end])

    def _range(self, parameter: Tensor) -> tuple[Any, int, int]:
        """Return a parameter's data-parallel group, and the range of its elements that this rank's master holds."""
        holder = next((part for part in self._parts if parameter in part.model_param_gbuf_map), None)
        if holder is None:  # held by other ranks only
            return self._parts[0].data_parallel_group, 0, 0
        found = holder._get_model_param_range_map(parameter)["param"]
        return holder.data_parallel_group, found.start, found.end


def _has_master(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.dtype != torch.float32 and hasattr(parameter, "main_param")


def _main(parameter: Tensor) -> Any:
    return parameter.main_param  # type: ignore[attr-defined]
