"""Writes and reads one checkpoint: Megatron-Core's distributed files, then a marker that makes it valid.

Contents: ``model`` (with LoRA only the adapters, since the base is the start model, identified by its fingerprint) and
``optimizer`` (fp32 masters, Adam's moments), both as sharded tensors under Megatron-Core's names. The rest is JSON in
the marker.
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

from dpo_api.errors import DPOError, IncompatibleCheckpointError
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
"""If the disk has less free space than this after a failed write, it is full."""

FORMAT = 1
"""Version of the format; incremented when older versions cannot read it."""


@dataclass(frozen=True)
class Marker:
    """The contents of a checkpoint's marker."""

    step: int
    attempt: int
    identity: Identity
    metrics: dict[str, float] = field(default_factory=dict)
    validated: bool = True  #: False if the run stopped before this step's validation
    saved_at: float | None = None  #: Unix seconds when it was complete; set by ``save``
    format: int = FORMAT


def save(run: RunDirectory, world: World, sharded: Sharded, marker: Marker) -> SavedCheckpoint:
    """Write the checkpoint of ``marker.step`` on all ranks. It exists once its marker does.

    A collective. Raises FencedError (on all ranks, since rank 0 fails) if a later attempt owns the directory.
    """
    uri = run.checkpoint_uri(marker.step)
    if world.is_main:
        run.check_fence()
        _remove(run, uri)  # files of a killed attempt
    # Megatron-Core would start a manager process for this queue in our process group. torchrun sends SIGTERM to the
    # whole group, so the manager would be gone when the final checkpoint needs it. A synchronous save uses the queue
    # in this process only, where a plain queue is enough.
    filesystem_async._results_queue = queue.Queue()
    with _writable(world, uri) as folder, _no_space_if_full(folder):
        world.barrier()
        dist_checkpointing.save(sharded, str(folder), content_metadata={"format": FORMAT})
        world.barrier()
        _publish(run, world, folder, uri)
    world.barrier()  # all nodes have written their files
    if world.is_main:
        run.check_fence()
        run.write_json("checkpoints", f"step-{marker.step:06d}", MARKER, {**asdict(marker), "saved_at": time.time()})
    return SavedCheckpoint(marker.step, uri)


def keep_newest(run: RunDirectory, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, and the incomplete ones of killed attempts.

    Call it only after completing a checkpoint: then no other process writes, so a folder without marker is incomplete.
    """
    kept = {f"{saved.uri.rpartition('/')[2]}/" for saved in run.checkpoints()[-keep:]}
    for name in run.store.children(run.path("checkpoints", "")):
        if name.startswith("step-") and name.endswith("/") and name not in kept:
            _remove(run, run.path("checkpoints", name.rstrip("/")))


def _remove(run: RunDirectory, uri: str) -> None:
    """Delete a checkpoint, marker first, so that a partly deleted one never looks complete."""
    run.store.delete(f"{uri}/{MARKER}")
    run.store.delete_tree(uri + "/")


def read_marker(run: RunDirectory, saved: SavedCheckpoint) -> Marker:
    """Read the marker of a complete checkpoint. Raises IncompatibleCheckpointError if it is newer or damaged."""
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
    """Read the checkpoint into the structure of ``sharded``; return it with its ShardedTensors replaced by tensors.

    A collective."""
    with _readable(run, world, saved.uri) as folder:
        check_metadata(folder / ".metadata", saved.uri)
        world.barrier()
        try:
            with bridge.construction(), _no_pickled_code():
                loaded: Sharded = dist_checkpointing.load(sharded, str(folder))
        except DPOError:
            raise  # it says more than that the checkpoint cannot be read
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
    """Make each ``torch.load`` refuse everything but tensors and plain values.

    Without this, torch's reader of distributed checkpoints unpickles everything that is not a tensor unrestrictedly.
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
    """Return the error of the first rank that failed, which torch wraps together with its traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        wrapped: tuple[BaseException, Any] = next(iter(error.failures.values()))
        return wrapped[0]
    return error


@contextmanager
def _no_space_if_full(folder: Path) -> Iterator[None]:
    """Raise NoSpaceError if the disk is full. torch's writer rarely lets the OSError through."""
    try:
        yield
    except (Exception, CheckpointException):
        probe = folder / "probe"
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        except OSError as error:
            # A partial checkpoint is useless, and the report of why the run ended needs the space.
            shutil.rmtree(folder, ignore_errors=True)
            raise from_os_error(error, str(folder)) from None
        probe.unlink()
        raise


@contextmanager
def _writable(world: World, uri: str) -> Iterator[Path]:
    """A folder to save into: the target itself, or one temporary folder per node that is uploaded afterwards."""
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
    """One temporary folder for all processes of this node. Rank 0 chooses its name, which is the same on every node."""
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
