"""Writes and reads one checkpoint: Megatron-Core's distributed files, then a marker that makes it exist.

Contents: ``model`` (with LoRA only the adapters: the base is the start model, named by its fingerprint) and
``optimizer`` (fp32 masters, Adam's moments), both as sharded tensors in Megatron-Core's names. All else is JSON in the marker.
"""

import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from dpo_api.errors import IncompatibleCheckpointError
from dpo_store import local_path_of
from dpo_trainer import bridge
from dpo_trainer.checkpoint.identity import Identity
from dpo_trainer.checkpoint.pickles import check_metadata
from dpo_trainer.distributed import World
from dpo_trainer.rundir import MARKER, RunDirectory, SavedCheckpoint

Sharded = dict[str, Any]
"""Megatron-Core's sharded state dict: nested names -> ShardedTensor, ShardedObject or plain values."""

FORMAT = 1
"""Raised when an older version could not read what this one writes."""


@dataclass(frozen=True)
class Marker:
    """What a checkpoint says of itself."""

    step: int
    attempt: int
    identity: Identity
    metrics: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT


def save(run: RunDirectory, world: World, sharded: Sharded, marker: Marker) -> SavedCheckpoint:
    """Write the checkpoint of ``marker.step`` on all ranks; it exists once its marker does, or not at all.

    A collective. Raises FencedError (on all ranks, by way of rank 0's failure) when a later attempt owns the directory.
    """
    uri = run.checkpoint_uri(marker.step)
    if world.is_main:
        run.check_fence()
        run.store.delete_tree(uri + "/")  # what a killed attempt left half-written
    with _writable(world, uri) as folder:
        world.barrier()
        dist_checkpointing.save(sharded, str(folder), content_metadata={"format": FORMAT})
        world.barrier()
        _publish(run, world, folder, uri)
    world.barrier()  # every node's files are there
    if world.is_main:
        run.check_fence()
        run.write_json("checkpoints", f"step-{marker.step:06d}", MARKER, asdict(marker))
    return SavedCheckpoint(marker.step, uri)


def keep_newest(run: RunDirectory, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints; the marker goes first, so none is ever half there."""
    for old in run.checkpoints()[:-keep]:
        run.store.delete(f"{old.uri}/{MARKER}")
        run.store.delete_tree(old.uri + "/")


def read_marker(run: RunDirectory, saved: SavedCheckpoint) -> Marker:
    """The marker of a complete checkpoint. Raises IncompatibleCheckpointError for a newer format."""
    found = run.read_json("checkpoints", f"step-{saved.step:06d}", MARKER) or {}
    if found.get("format", 0) > FORMAT:
        raise IncompatibleCheckpointError(
            f"{saved.uri} has checkpoint format {found['format']}; this version reads up to {FORMAT}: use a newer image"
        )
    return Marker(**{name: found[name] for name in Marker.__dataclass_fields__ if name in found})


def load(run: RunDirectory, world: World, sharded: Sharded, saved: SavedCheckpoint) -> Sharded:
    """Read the checkpoint into the shape of ``sharded``; returns it with tensors for ShardedTensors. A collective."""
    with _readable(run, world, saved.uri) as folder:
        check_metadata(folder / ".metadata", saved.uri)
        world.barrier()
        try:
            with bridge.construction():
                loaded: Sharded = dist_checkpointing.load(sharded, str(folder))
        except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
            raise IncompatibleCheckpointError(
                f"{saved.uri} cannot be read ({type(error).__name__}: {error}); "
                "delete that folder to resume from an older one"
            ) from error
        world.barrier()
    return loaded


@contextmanager
def _writable(world: World, uri: str) -> Iterator[Path]:
    """A folder to save into: the place itself, or one scratch folder a node that is uploaded afterwards."""
    local = local_path_of(uri)
    if local is not None:
        if world.is_main:
            local.mkdir(parents=True, exist_ok=True)
        yield local
        return
    with _scratch(world) as folder:
        yield folder


@contextmanager
def _readable(run: RunDirectory, world: World, uri: str) -> Iterator[Path]:
    local = local_path_of(uri)
    if local is not None:
        yield local
        return
    with _scratch(world) as folder:
        if world.local_rank == 0:
            run.store.download_tree(uri + "/", folder)
        world.barrier()
        yield folder


@contextmanager
def _scratch(world: World) -> Iterator[Path]:
    """One temporary folder for all processes of this node, named by rank 0 and so the same on each node."""
    name = world.from_main(tempfile.mktemp(prefix="dpo-checkpoint-", dir="") if world.is_main else None)  # noqa: S306 - a name, not a file; the folder is made with mode 700 below
    folder = Path(tempfile.gettempdir()) / name.lstrip("/")
    if world.local_rank == 0:
        folder.mkdir(mode=0o700)
    world.barrier()
    try:
        yield folder
    finally:
        if world.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _publish(run: RunDirectory, world: World, folder: Path, uri: str) -> None:
    if local_path_of(uri) is None and world.local_rank == 0:
        run.store.upload_tree(folder, uri + "/")
