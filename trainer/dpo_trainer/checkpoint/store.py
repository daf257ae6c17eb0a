"""Writes and reads one checkpoint: a file from each rank, a table of contents, then a marker that makes it valid.

Contents: fp32 masters and Adam's moments under Megatron-Core's names, with LoRA only those of the adapters, since the
base is the start model, identified by its fingerprint. The rest is JSON in the marker.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_api.errors import DPOError, IncompatibleCheckpointError, NotFoundError
from dpo_api.models.megatron.distributed import TABLE
from dpo_store import ObjectInfo, Store, local_path_of
from dpo_store.errors import from_os_error
from dpo_trainer.checkpoint import files
from dpo_trainer.checkpoint.boxes import Box
from dpo_trainer.checkpoint.identity import Identity
from dpo_trainer.checkpoint.pickles import check_metadata
from dpo_trainer.distributed import World
from dpo_trainer.rundir import MARKER, RunDirectory, SavedCheckpoint

_PROBE_BYTES = 1 << 20
"""If the disk has less free space than this after a failed write, it is full."""

MOST_READ = 2.0
"""A start reads parts of files while the ranks together read at most this many times what the nodes would copy.

In the layout that saved, they read the checkpoint once, and each node would copy the whole of it. In another one,
several ranks may need the same part.
"""
_BLOCK = 16 << 20
_PARALLEL_READS = 4

FORMAT = 2
"""Version of the format; incremented when older versions cannot read it.

1: written by Megatron-Core, which gathered the optimizer's state first. 2: each rank's own boxes. Both are read.
"""


@dataclass(frozen=True)
class Marker:
    """The contents of a checkpoint's marker."""

    step: int
    attempt: int
    identity: Identity
    metrics: dict[str, float] = field(default_factory=dict)
    validated: bool = True  #: False if the run stopped before this step's validation
    saved_at: float | None = None  #: Unix seconds when it was complete; set by ``save``
    choice: dict[str, Any] = field(default_factory=dict)  #: ``choosing.Chooser.state``
    format: int = FORMAT


def save(run: RunDirectory, world: World, boxes: Sequence[Box], marker: Marker) -> SavedCheckpoint:
    """Write the checkpoint of ``marker.step``: on each rank its own boxes. It exists once its marker does.

    A collective. Raises FencedError (on all ranks, since rank 0 fails) if a later attempt owns the directory.
    """
    begin(run, world, marker.step)
    return complete(run, world, write(run, world.rank, marker.step, boxes), marker)


def begin(run: RunDirectory, world: World, step: int) -> None:
    """Check the fence and remove what a killed attempt left of this step's checkpoint. A collective."""
    if world.is_main:
        run.check_fence()
        _remove(run, run.checkpoint_uri(step))
    world.barrier()


def complete(run: RunDirectory, world: World, written: list[files.Written], marker: Marker) -> SavedCheckpoint:
    """Write the table of contents and the marker, once all ranks have written their files. A collective.

    written: what ``write`` returned on this rank.
    """
    uri = run.checkpoint_uri(marker.step)
    everything = world.to_main(written)
    if everything is not None:
        run.check_fence()
        run.store.write(f"{uri}/{TABLE}", files.table([box for part in everything for box in part]))
        run.write_json("checkpoints", f"step-{marker.step:06d}", MARKER, {**asdict(marker), "saved_at": time.time()})
    return SavedCheckpoint(marker.step, uri)


def write(
    run: RunDirectory, rank: int, step: int, boxes: Sequence[Box], values_of: files.ValuesOf | None = None
) -> list[files.Written]:
    """Write a rank's file, and upload it if the checkpoint is not in a local folder. Not a collective.

    values_of: the boxes' values, if not their own; see ``files.write``.
    """
    uri = run.checkpoint_uri(step)
    local = local_path_of(uri)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
        with _no_space_if_full(local):
            return files.write(local, rank, boxes, values_of)
    with tempfile.TemporaryDirectory(prefix="dpo-checkpoint-") as name:
        with _no_space_if_full(Path(name)):
            written = files.write(Path(name), rank, boxes, values_of)
        run.store.upload_tree(name, uri + "/")
        return written


def change_marker(run: RunDirectory, world: World, marker: Marker) -> None:
    """Replace the marker of a complete checkpoint. A collective."""
    if world.is_main:
        run.check_fence()
        run.write_json("checkpoints", f"step-{marker.step:06d}", MARKER, asdict(marker))
    world.barrier()


def keep_newest(run: RunDirectory, keep: int, best: int | None = None) -> None:
    """Delete all complete checkpoints but the newest ``keep`` and that of step ``best``, and incomplete ones.

    Call it only after completing a checkpoint: then no other process writes, so a folder without marker is incomplete.
    """
    there = run.checkpoints()
    kept = {f"{s.uri.rpartition('/')[2]}/" for s in there if s in there[-keep:] or s.step == best}
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


def load(run: RunDirectory, world: World, boxes: Sequence[Box], saved: SavedCheckpoint, version: int) -> None:
    """Fill the boxes with the checkpoint's values. version: the format that its marker has. A collective.

    From S3 a rank reads the parts of the files that its boxes are in, or, where the ranks together would read far more
    than the nodes if each copied the checkpoint, the nodes copy it.
    """
    local = local_path_of(saved.uri)
    with _table(run, saved.uri) as folder:
        check_metadata(folder / TABLE, saved.uri)
        with _incompatible_if_unreadable(saved.uri):
            reading = files.Reading(folder, boxes, version)
    if local is None and not _is_little(reading, world):
        with _copied(run, world, saved.uri) as folder, _incompatible_if_unreadable(saved.uri):
            reading.from_folder(folder)
            world.barrier()
        return
    with _incompatible_if_unreadable(saved.uri):
        if local is not None:
            reading.from_folder(local)
        else:
            reading.from_ranges(_Ranges(run.store, saved.uri))
    world.barrier()


def _is_little(reading: files.Reading, world: World) -> bool:
    """Whether the ranks together read at most MOST_READ times what the nodes would copy. A collective."""
    own = torch.tensor([reading.bytes, float(world.local_rank == 0)], dtype=torch.float64)
    needed, nodes = world.sum_of_all(own).tolist()
    return bool(needed <= MOST_READ * nodes * reading.bytes_of_all)


class _Ranges:
    """Reads parts of a checkpoint's files from a store, large ones by several requests at a time."""

    def __init__(self, store: Store, uri: str) -> None:
        self._store, self._uri = store, uri
        self._objects: dict[str, ObjectInfo] = {}

    def __call__(self, name: str, start: int, length: int) -> bytes:
        if name not in self._objects:
            self._objects[name] = self._store.stat(f"{self._uri}/{name}")
        found, end = self._objects[name], start + length

        def fetch(at: int) -> bytes:
            return self._store.read(found, at, min(_BLOCK, end - at))

        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            return b"".join(pool.map(fetch, range(start, end, _BLOCK)))


@contextmanager
def _incompatible_if_unreadable(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, DPOError) and not isinstance(error, NotFoundError):
            raise  # of the storage
        raise IncompatibleCheckpointError(
            f"{uri} cannot be read ({type(error).__name__}: {str(error).strip().partition('\n')[0][:300]}); "
            "delete that folder to resume from an older one"
        ) from error


@contextmanager
def _no_space_if_full(folder: Path) -> Iterator[None]:
    """Raise NoSpaceError if the disk is full. torch's writer rarely lets the OSError through."""
    try:
        yield
    except Exception:
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
def _table(run: RunDirectory, uri: str) -> Iterator[Path]:
    """Yield a local folder that has the checkpoint's table of contents, if the checkpoint has one."""
    local = local_path_of(uri)
    if local is not None:
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="dpo-checkpoint-") as name:
        with suppress(NotFoundError):
            run.store.download(f"{uri}/{TABLE}", Path(name) / TABLE)
        yield Path(name)


@contextmanager
def _copied(run: RunDirectory, world: World, uri: str) -> Iterator[Path]:
    """Yield a local folder with the whole checkpoint, one for each node. A collective."""
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
