"""Loads a checkpoint into Megatron-Core's distributed optimizer when its Adam is torch's.

Without Apex and Transformer Engine, megatron-core 0.19 has three defects there. It reads the step of a new Adam, which
has none before its first update. It looks for the step among the loaded tensors, where it is not. It shares one step
tensor between all parameters, so each update increments it once per parameter. Other implementations of Adam keep the
step elsewhere: for them ``allocate`` does nothing and ``load`` only loads.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def allocate(optimizer: Any) -> None:
    """Give a new optimizer its moments, so that it has a sharded state dict. Changes none that has stepped."""
    for part in _parts(optimizer):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    inner.state[parameter] = {"step": torch.tensor(0.0), **moments}


def load(optimizer: Any, state: dict[str, Any]) -> None:
    """Call ``optimizer.load_state_dict(state)``, then give each parameter its own step tensor."""
    parts = list(_parts(optimizer))
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_without_step(part))
        optimizer.load_state_dict(state)
    for part in parts:
        for moments in part.optimizer.state.values():
            moments["step"] = moments["step"].clone()


def _parts(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            yield part


@contextmanager
def _without_step(part: Any) -> Iterator[None]:
    """Make the part copy only what a checkpoint holds for a parameter, which does not include the step."""
    copy = getattr(part, "_set_main_param_and_optimizer_states", None)
    if copy is None:  # not the distributed optimizer
        yield
        return
    part._set_main_param_and_optimizer_states = lambda parameter, tensors: copy(parameter, {"step": None, **tensors})
    try:
        yield
    finally:
        del part._set_main_param_and_optimizer_states
