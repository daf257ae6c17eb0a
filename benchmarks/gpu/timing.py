"""Times of work on the GPU, or on the CPU where there is none."""

import time
from collections.abc import Callable
from typing import Any

import torch

from dpo_trainer import bridge


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if not bridge.needed():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], times: int = 1) -> float:
    """The shortest of several runs, the GPU's work included."""
    found: list[float] = []
    for _ in range(times):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - began)
    return min(found)
