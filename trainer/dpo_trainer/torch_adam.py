"""Prepares a new optimizer for its first update, whichever implementation of Adam it has.

Adam allocates its moments in its first update. torch's Adam counts the updates in a tensor for each parameter; those of
Transformer Engine and Apex count them in the parameter group.
"""

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch

from dpo_trainer import bridge


def allocate(optimizer: Any, step: int) -> None:
    """Give a new optimizer moments of zero, to be filled, and the number of its updates so far."""
    for inner in _inner(optimizer):
        counts = _is_torchs(inner)
        for group in inner.param_groups:
            if not counts:
                group["step"] = step
            for parameter in group["params"]:
                state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if counts:  # the fused kernel reads the count on its own device
                    place = parameter.device if group["fused"] else torch.device("cpu")
                    state["step"] = torch.tensor(float(step), dtype=torch.float32, device=place)
                inner.state[parameter] = state


def fuse(optimizer: Any) -> None:
    """Let torch's Adam update all parameters in one kernel, which makes no copies of them.

    Megatron-Core builds it without that choice. torch's own default for GPUs holds 4 bytes more per parameter, and that
    for CPUs takes four times as long. Other implementations are fused already.

    torch wraps ``step`` in a function that imports its compiler, to break a graph that it may be compiling. Without a
    GPU nothing is compiled, and the step is called directly.
    """
    for inner in _inner(optimizer):
        if _is_torchs(inner):
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False
            if bridge.needed():
                inner.step = MethodType(torch.no_grad()(inspect.unwrap(type(inner).step)), inner)


def _inner(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizers inside Megatron-Core's; a pipeline stage without trainable parameters has none."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return (part.optimizer for part in parts if part.optimizer is not None)


def _is_torchs(inner: Any) -> bool:
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)
