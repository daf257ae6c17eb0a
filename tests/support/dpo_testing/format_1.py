"""Writes checkpoints of format 1, as versions before format 2 did: by Megatron-Core, which gathers the state."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
import queue
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from dpo_trainer import bridge
from dpo_trainer.engine import Engine
from dpo_trainer.rundir import MARKER, RunDirectory

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def save_format_1(engine: Engine, run: RunDirectory, step: int) -> None:
    """Save the engine's state after ``step`` updates. A collective."""
    filesystem_async._results_queue = queue.Queue()  # otherwise it starts a process that outlives this one
    folder = Path(run.checkpoint_uri(step))
    folder.mkdir(parents=True, exist_ok=True)
    engine.world.barrier()
    trained = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    with bridge.construction():
        model = engine.model.sharded_state_dict(metadata=dict(METADATA))
        model = {name: value for name, value in model.items() if name in trained}
        optimizer = engine.optimizer.sharded_state_dict(model, is_loading=False, metadata=dict(METADATA))
    dist_checkpointing.save({"model": model, "optimizer": optimizer}, str(folder), content_metadata={"format": 1})
    if engine.world.is_main:
        marker = {"step": step, "attempt": 1, "identity": {}, "format": 1}
        run.write_json("checkpoints", f"step-{step:06d}", MARKER, marker)
    engine.world.barrier()
