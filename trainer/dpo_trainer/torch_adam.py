"""Prepares a new optimizer for the state of a checkpoint, whichever implementation of Adam it has.

Adam allocates its moments in its first update. torch's Adam counts the updates in a tensor for each parameter; those of
Transformer Engine and Apex count them in the parameter group.
"""

from typing import Any

import torch


def allocate(optimizer: Any, step: int) -> None:
    """Give a new optimizer moments of zero, to be filled, and the number of its updates so far."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:  # a pipeline stage without trainable parameters
            continue
        counts = isinstance(inner, torch.optim.Adam | torch.optim.AdamW)
        for group in inner.param_groups:
            if not counts:
                group["step"] = step
            for parameter in group["params"]:
                state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if counts:
                    state["step"] = torch.tensor(float(step))
                inner.state[parameter] = state
