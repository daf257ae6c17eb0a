"""Megatron-Core's parallel linear layers, with an optional adapter."""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


class _Adaptable:
    """Mixed into a parallel linear layer: y = Wx, plus the adapter's output when one is attached and enabled.

    The adapter is the submodule ``adapter``: the base weight keeps its name in every state dict, and the checkpoint
    of a model without adapters is the same as that of plain Megatron-Core layers.
    """

    adapter: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Set on the instance: a class attribute would hide the submodule, which torch looks up last.
        self.adapter = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias) as Megatron-Core's linear layers do."""
        output, bias = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self.adapter is not None and self.adapter.enabled:
            output = output + self.adapter(x)
        return output, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The base's entries, and the adapter's with their own sharding."""
        # The base reads state_dict(), which holds the adapter's tensors too: without their own axes.
        entries: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = f"{prefix}adapter."
        entries = {name: entry for name, entry in entries.items() if not name.startswith(own)}
        if self.adapter is not None:
            entries.update(self.adapter.sharded_state_dict(own, sharded_offsets, metadata))
        return entries


class AdaptableColumnParallelLinear(_Adaptable, ColumnParallelLinear):
    """Y = XAᵀ with A's rows split over tensor-parallel ranks, and an optional adapter."""


class AdaptableRowParallelLinear(_Adaptable, RowParallelLinear):
    """Y = XAᵀ with A's columns split over tensor-parallel ranks, and an optional adapter."""


def transformer_engine_linears() -> tuple[type[nn.Module], type[nn.Module]]:
    """The (column, row) parallel classes on Transformer Engine's layers; ImportError without Transformer Engine."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    column = type("AdaptableTEColumnParallelLinear", (_Adaptable, TEColumnParallelLinear), {})
    row = type("AdaptableTERowParallelLinear", (_Adaptable, TERowParallelLinear), {})
    return column, row
