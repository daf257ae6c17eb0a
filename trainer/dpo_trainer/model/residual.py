"""How a layer adds what its attention and its MLP return."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class LayerWithNormsAfter(TransformerLayer):
    """Megatron-Core's layer, which adds to the residual with gradients on, also where the layer will be recomputed.

    A norm there would keep its input although nothing of this pass is needed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = nullcontext


class ResidualAdd(torch.nn.Module):
    """residual + scale · norm(branch). Built by the layer spec in place of Megatron-Core's bias, dropout and addition.

    norm: builds a norm over the hidden state; None: the branch is added as it is.
    """

    def __init__(self, config: Any, *, scale: float, norm: Any) -> None:
        super().__init__()
        self.scale = scale
        self.norm = (
            None if norm is None else norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        )

    def forward(self, _training: bool, _fused: bool, /) -> Add:
        """Return what Megatron-Core calls with the branch's (output, bias), the residual, and a dropout of 0."""
        return self._add

    def _add(self, branch: tuple[Tensor, Tensor | None], residual: Tensor, _dropout: float) -> Tensor:
        added, _ = branch  # no family has a bias here
        if self.norm is not None:
            added = self.norm(added)
        return residual + (added if self.scale == 1 else added * self.scale)
