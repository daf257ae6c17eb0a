"""Runs a function on several processes of this machine that share a gloo group."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in ``ranks`` fresh processes inside one gloo group.

    function: of an importable module, since the processes are spawned. Raises what the first failing rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_enter, (ranks, str(Path(folder) / "store"), function, arguments), nprocs=ranks, join=True)


def _enter(rank: int, ranks: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
