"""Inputs of linear layers that the backward pass computes a second time: the outputs of norms and of activations.

A linear layer keeps its input for the gradient of its weight. A norm and an activation keep their own inputs, from
which their outputs follow without a matrix product, so keeping the outputs too is not worth their memory. As
Megatron-Core does for its ``recompute_modules``: when the layer has read its input, the memory is given back; when the
gradient of the layer's output arrives, the same operations compute the same values into the same storage.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

DEVICES = frozenset({"cpu"})
"""Types of devices on which memory is given back. The memory model (dpo_api.sizing) counts for GPUs what is kept."""

_HOW = "dpo_computed_by"


def repeatable(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function(x)``, whose memory ``give_back`` may give back.

    ``function`` keeps ``x`` for its own backward pass, and gives the same values for it each time.
    """
    out = function(x)
    if out.requires_grad and out.device.type in DEVICES:
        setattr(out, _HOW, partial(function, x.detach()))
    return out


def give_back(x: Tensor, output: Tensor) -> None:
    """Give back the memory of ``x`` until the backward pass of the layer that computed ``output`` from it.

    No other operation may read ``x`` afterwards. Nothing happens if ``x`` is not the whole result of ``repeatable``.
    """
    how: Callable[[], Tensor] | None = getattr(x, _HOW, None)
    if how is None or not output.requires_grad or not x.is_contiguous():
        return
    storage = x.untyped_storage()
    size = storage.nbytes()
    if x.nbytes != size:
        return
    waiting = [(storage, how)]
    storage.resize_(0)

    def fill(_gradient: Tensor) -> None:
        # The hook lives as long as the graph. It lets go of both, so that they are freed when the layers free them.
        if waiting:
            again, computed = waiting.pop()
            with torch.no_grad():
                values = computed().contiguous()
            again.resize_(size)
            again.copy_(values.untyped_storage(), non_blocking=False)

    output.register_hook(fill)
