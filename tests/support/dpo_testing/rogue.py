"""A process that joins a run by its rendezvous port alone, and the process of the run that it meets.

`python -m dpo_testing.rogue ROLE SCENE FOLDER`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The rogue does what
a process of the run does, but sends a pickle that would write FOLDER/proof. The other writes FOLDER/victim: how it
would end, as JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCENES = ("metadata", "plan", "results", "value")
"""What the rogue sends: one of the three exchanges of Megatron-Core's save, in their order, or rank 0's own value."""


class Evil:
    """Its pickle runs a command in the process that reads it."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"echo ran in $PPID >> '{self.proof}'",)


def meet(scene: str, folder: Path, start: Callable[..., subprocess.Popen[Any]], environment: dict[str, str]) -> Any:
    """Let a rogue and a process of a run meet; return how the latter ends: its outcome and message."""
    master = "rogue" if scene == "value" else "victim"
    processes = []
    for rank, role in enumerate((master, {"rogue": "victim", "victim": "rogue"}[master])):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "dpo_testing.rogue", role, scene, str(folder)]
        with (folder / f"{role}.log").open("wb") as log:
            processes.append(start(command, env={**environment, **place}, stdout=log, stderr=log))
    try:
        for process in processes:
            process.wait(240)
    finally:
        for process in processes:
            process.kill()
    return json.loads((folder / "victim").read_text())


def _save(world: Any, folder: Path) -> None:
    """Save a checkpoint of one tensor by Megatron-Core, which plans it by torch's object collectives."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from dpo_trainer import bridge

    filesystem_async._results_queue = queue.Queue()  # otherwise it starts a process that outlives this one
    (folder / "checkpoint").mkdir(exist_ok=True)
    with bridge.construction():
        mine = ShardedTensor.from_rank_offsets("weight", torch.ones(4), (0, world.rank, 2))
        dist_checkpointing.save({"weight": mine}, str(folder / "checkpoint"))


def _rogue(world: Any, scene: str, folder: Path) -> None:
    from torch.distributed import broadcast_object_list, distributed_c10d

    evil = Evil(folder / "proof")
    if scene == "value":
        broadcast_object_list([evil], src=0)
        return
    honest = SCENES.index(scene)
    sent = 0

    def pickler(file: Any) -> Any:
        nonlocal sent
        sent += 1
        found = pickle.Pickler(file)
        return found if sent <= honest else _Instead(found, evil)

    distributed_c10d._pickler = pickler  # type: ignore[assignment]
    _save(world, folder)


class _Instead:
    def __init__(self, pickler: pickle.Pickler, evil: Evil) -> None:
        self.pickler, self.evil = pickler, evil

    def dump(self, _: Any) -> None:
        self.pickler.dump(self.evil)


def _main(role: str, scene: str, folder: Path) -> None:
    import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core
    from dpo_trainer.distributed import World
    from dpo_trainer.worker import explain

    world = World.join(timeout_seconds=120)
    if role == "rogue":
        _rogue(world, scene, folder)
        os._exit(0)
    try:
        if scene == "value":
            world.from_main(None)
        else:
            _save(world, folder)
        said = ["", "it noticed nothing"]
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test compares it
        outcome, message = explain(error)
        said = [outcome.name, message]
    (folder / "victim").write_text(json.dumps(said))
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
