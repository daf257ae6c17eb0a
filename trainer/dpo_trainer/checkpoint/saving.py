"""Saves checkpoints while training goes on.

A save in the background has three parts. The ranks begin it together. Each copies its boxes to host memory, while the
next forward and backward pass runs, then writes and uploads them in a thread. When all have, they complete it together
at the beginning of a step; only then does the checkpoint exist.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dpo_trainer.checkpoint import store
from dpo_trainer.checkpoint.boxes import Box
from dpo_trainer.checkpoint.files import Written
from dpo_trainer.distributed import World
from dpo_trainer.rundir import RunDirectory, SavedCheckpoint


@dataclass
class _Save:
    """A save under way. The thread sets what comes after ``thread``."""

    marker: store.Marker
    began: float
    event: Any = None  #: of the GPU: the copies are made. None on the CPU, where the thread copies
    thread: threading.Thread | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    written: list[Written] | None = None
    error: Exception | None = None
    ended: float = 0.0


class Saver:
    """The saves of one rank, one at a time."""

    def __init__(self, run: RunDirectory, world: World, *, background: bool) -> None:
        self.background = background
        self.seconds: float | None = None
        """How long this rank's part of the last save took."""
        self._run, self._world = run, world
        self._under_way: _Save | None = None
        self._copies: list[Box] = []  # kept between saves: memory of this kind takes long to allocate
        self._stream = torch.cuda.Stream() if background and world.device.type == "cuda" else None

    @property
    def busy(self) -> bool:
        """Whether this rank is writing its part of a save. Raises the error that ended the writing."""
        save = self._under_way
        if save is None:
            return False
        if save.error is not None:
            raise save.error
        return save.written is None

    def begin(self, boxes: Sequence[Box], marker: store.Marker) -> None:
        """Begin to save. A collective; the save before must be complete. In the foreground, this rank writes now.

        boxes: of the live state, which must not change before ``wait_for_copy`` returns.
        """
        assert self._under_way is None  # noqa: S101 - the caller completes one before the next
        save = _Save(marker, time.monotonic())
        store.begin(self._run, self._world, marker.step)
        if not self.background:
            save.written = store.write(self._run, self._world.rank, marker.step, boxes)
            save.ended = time.monotonic()
            self._under_way = save
            return
        copies = self._buffers(boxes)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                _copy(boxes, copies)
                save.event = self._stream.record_event()
        save.thread = threading.Thread(target=self._work, args=(save, boxes, copies), name="checkpoint", daemon=True)
        self._under_way = save
        save.thread.start()

    def wait_for_copy(self) -> None:
        """Let what follows change the state: it waits until this rank's copies are made."""
        save = self._under_way
        if save is None or save.thread is None:
            return
        if save.event is not None:
            torch.cuda.current_stream().wait_event(save.event)
        else:
            save.copied.wait()

    def complete(self) -> SavedCheckpoint | None:
        """Wait until all ranks have written their parts, and make the checkpoint valid; None if nothing is being saved.

        A collective. Raises the error that ended this rank's writing.
        """
        save = self._under_way
        if save is None:
            return None
        if save.thread is not None:
            save.thread.join()
        self._under_way = None
        if save.error is not None:
            raise save.error
        assert save.written is not None  # noqa: S101 - the thread has ended without an error
        self.seconds = save.ended - save.began
        return store.complete(self._run, self._world, save.written, save.marker)

    def _work(self, save: _Save, boxes: Sequence[Box], copies: list[Box]) -> None:
        try:
            try:
                if save.event is None:
                    _copy(boxes, copies)
                else:
                    torch.cuda.set_device(self._world.device)  # a thread begins with the first GPU
                    save.event.synchronize()
            finally:
                save.copied.set()
            save.written = store.write(self._run, self._world.rank, save.marker.step, copies)
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            save.error = error
        save.ended = time.monotonic()

    def _buffers(self, boxes: Sequence[Box]) -> list[Box]:
        """Return boxes of host memory with the same places: one block of just the bytes that are saved."""
        if not self._copies:
            sizes = [box.values.numel() for box in boxes]
            block = torch.empty(sum(sizes))
            if self._stream is not None and block.nbytes:
                # torch's own allocator of pinned memory would round the size up to a power of two.
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
            parts = block.split(sizes)
            self._copies = [
                replace(box, values=part.view(box.values.shape)) for box, part in zip(boxes, parts, strict=True)
            ]
        return self._copies


@torch.no_grad()
def _copy(boxes: Sequence[Box], copies: Sequence[Box]) -> None:
    for box, copy in zip(boxes, copies, strict=True):
        copy.values.copy_(box.values, non_blocking=True)
