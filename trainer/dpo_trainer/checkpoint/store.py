"""Writes and reads one checkpoint: Megatron-Core's distributed files, then a marker that makes it exist.

Contents: ``model`` (with LoRA only the adapters: the base is the start model, named by its fingerprint) and
``optimizer`` (fp32 masters, Adam's moments), both as sharded tensors in Megatron-Core's names. All else is JSON in the
marker.
"""

import os
import queue
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from dpo_api.errors import IncompatibleCheckpointError
from dpo_store import local_path_of
from dpo_store.errors import from_os_error
from dpo_trainer import bridge
from dpo_trainer.checkpoint.identity import Identity
from dpo_trainer.checkpoint.pickles import check_metadata
from dpo_trainer.distributed import World, lost_contact
from dpo_trainer.rundir import MARKER, RunDirectory, SavedCheckpoint

Sharded = dict[str, Any]
"""Megatron-Core's sharded state dict: nested names -> ShardedTensor, ShardedObject or plain values."""

_PROBE_BYTES = 1 << 20
"""A disk without this much room is full: a failed writer has used up what there was."""

FORMAT = 1
"""Raised when an older version could not read what this one writes."""


@dataclass(frozen=True)
class Marker:
    """What a checkpoint says of itself."""

    step: int
    attempt: int
    identity: Identity
    metrics: dict[str, float] = field(default_factory=dict)
    validated: bool = True  #: False: a stop came before the validation that this step was due
    saved_at: float | None = None  #: Unix seconds at which it was complete; ``save`` says it
    format: int = FORMAT


def save(run: RunDirectory, world: World, sharded: Sharded, marker: Marker) -> SavedCheckpoint:
    """Write the checkpoint of ``marker.step`` on all ranks; it exists once its marker does, or not at all.

    A collective. Raises FencedError (on all ranks, by way of rank 0's failure) when a later attempt owns the directory.
    """
    uri = run.checkpoint_uri(marker.step)
    if world.is_main:
        run.check_fence()
        _remove(run, uri)  # what a killed attempt left half-written
    # Megatron-Core would make a manager process for this queue, in our process group: torchrun sends SIGTERM to the
    # whole group, so it would be gone when the stop's own checkpoint needs it. A synchronous save uses it in this
    # process only, where a plain queue does the same.
    filesystem_async._results_queue = queue.Queue()
    with _writable(world, uri) as folder, _told_when_full(folder):
        world.barrier()
        dist_checkpointing.save(sharded, str(folder), content_metadata={"format": FORMAT})
        world.barrier()
        _publish(run, world, folder, uri)
    world.barrier()  # every node's files are there
    if world.is_main:
        run.check_fence()
        run.write_json("checkpoints", f"step-{marker.step:06d}", MARKER, {**asdict(marker), "saved_at": time.time()})
    return SavedCheckpoint(marker.step, uri)


def keep_newest(run: RunDirectory, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, and what killed attempts left half-written.

    For whoever has just completed one: there is no other writer, so what has no marker will never have one.
    """
    kept = {f"{saved.uri.rpartition('/')[2]}/" for saved in run.checkpoints()[-keep:]}
    for name in run.store.children(run.path("checkpoints", "")):
        if name.startswith("step-") and name.endswith("/") and name not in kept:
            _remove(run, run.path("checkpoints", name.rstrip("/")))


def _remove(run: RunDirectory, uri: str) -> None:
    """Delete a checkpoint, its marker first: at no moment a half one exists."""
    run.store.delete(f"{uri}/{MARKER}")
    run.store.delete_tree(uri + "/")


def read_marker(run: RunDirectory, saved: SavedCheckpoint) -> Marker:
    """The marker of a complete checkpoint. Raises IncompatibleCheckpointError for a newer format or a damaged file."""
    try:
        found = run.read_json("checkpoints", f"step-{saved.step:06d}", MARKER) or {}
    except IncompatibleCheckpointError as error:
        raise IncompatibleCheckpointError(f"{error} from an older checkpoint") from None
    if found.get("format", 0) > FORMAT:
        raise IncompatibleCheckpointError(
            f"{saved.uri} has checkpoint format {found['format']}; this version reads up to {FORMAT}: use a newer image"
        )
    if found.get("step") != saved.step or not isinstance(found.get("identity"), dict):
        raise IncompatibleCheckpointError(
            f"{saved.uri}/{MARKER} is not what this software writes for step {saved.step}: "
            "delete that folder to resume from an older one"
        )
    return Marker(**{name: found[name] for name in Marker.__dataclass_fields__ if name in found})


def load(run: RunDirectory, world: World, sharded: Sharded, saved: SavedCheckpoint) -> Sharded:
    """Read the checkpoint into the shape of ``sharded``; returns it with tensors for ShardedTensors. A collective."""
    with _readable(run, world, saved.uri) as folder:
        check_metadata(folder / ".metadata", saved.uri)
        world.barrier()
        try:
            with bridge.construction(), _no_pickled_code():
                loaded: Sharded = dist_checkpointing.load(sharded, str(folder))
        except (Exception, CheckpointException) as error:
            if lost_contact(error):
                raise
            cause = _innermost(error)
            raise IncompatibleCheckpointError(
                f"{saved.uri} cannot be read ({type(cause).__name__}: {str(cause).strip().partition('\n')[0][:300]}); "
                "delete that folder to resume from an older one"
            ) from error
        world.barrier()
    return loaded


@contextmanager
def _no_pickled_code() -> Iterator[None]:
    """torch's reader of distributed checkpoints unpickles the parts that are no tensors without restriction.

    This switch of torch's makes each ``torch.load`` refuse everything but tensors and plain values.
    """
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _innermost(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed: torch wraps it with its traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        wrapped: tuple[BaseException, Any] = next(iter(error.failures.values()))
        return wrapped[0]
    return error


@contextmanager
def _told_when_full(folder: Path) -> Iterator[None]:
    """Raise NoSpaceError for whatever torch's writer makes of a full disk: from it an OSError rarely comes out."""
    try:
        yield
    except (Exception, CheckpointException):
        probe = folder / "probe"
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        except OSError as error:
            # Half a checkpoint is worth nothing, and what is written next (why the run ended) needs the room.
            shutil.rmtree(folder, ignore_errors=True)
            raise from_os_error(error, str(folder)) from None
        probe.unlink()
        raise


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
