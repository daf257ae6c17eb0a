"""Megatron-Core's parallel linear layers, with an optional adapter."""

from typing import Any

from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from dpo_trainer.model.again import give_back
from dpo_trainer.products import add_product


class _Adaptable:
    """Mixed into a parallel linear layer: y = Wx, to which an adapter adds its output if it is attached and enabled.

    The adapter is the submodule ``adapter``: the base weight keeps its name in every state dict, and the checkpoint
    of a model without adapters is the same as that of plain Megatron-Core layers.
    """

    adapter: Any
    weight: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Set on the instance: a class attribute would hide the submodule, which torch looks up last.
        self.adapter = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias) as Megatron-Core's linear layers do."""
        output, bias = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        adapted = self.adapter is not None and self.adapter.enabled
        if adapted:
            output = self.adapter(x, output)
        if adapted or self.weight.requires_grad:  # otherwise nothing keeps x
            give_back(x, output)
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


class _WeightGradients:
    """Stands for Apex's extension, by whose name Megatron-Core's layers call a GEMM that adds to ``main_grad``."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] += gradientᵀ [out, S] · inputs [S, in]; fp32, and the operands fp32 or bf16."""
        add_product(main_grad, gradient, inputs, first=False)


if not layers._grad_accum_fusion_available:
    layers.fused_weight_gradient_mlp_cuda = _WeightGradients


def add_weight_gradients_in_place(model: nn.Module) -> None:
    """Let the linear layers' weight gradients be added to ``main_grad`` by the GEMM itself, from now on.

    Otherwise each is written, read again to be added, and needs memory of its own. Call it when ``main_grad`` exists.
    """
    for module in model.modules():
        if isinstance(module, _Adaptable) and getattr(module.weight, "main_grad", None) is not None:
            name = "gradient_accumulation_fusion"
            setattr(module, name if hasattr(module, name) else "fuse_wgrad_accumulation", True)


def transformer_engine_linears() -> tuple[type[nn.Module], type[nn.Module]]:
    """The (column, row) parallel classes on Transformer Engine's layers; ImportError without Transformer Engine."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    column = type("AdaptableTEColumnParallelLinear", (_Adaptable, TEColumnParallelLinear), {})
    row = type("AdaptableTERowParallelLinear", (_Adaptable, TERowParallelLinear), {})
    return column, row
