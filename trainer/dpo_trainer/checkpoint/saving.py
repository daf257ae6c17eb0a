"""Saves checkpoints while training goes on.

A save in the background has three parts. The ranks begin it together. Each writes and uploads its boxes in a thread,
while training goes on. When all have, they complete it together at the beginning of a step; only then does the
checkpoint exist.

What is written is the state at the beginning. From a GPU, all of it is copied to host memory while the next forward and
backward pass runs. On a CPU the thread writes the state itself during that pass, a box at a time, and only what is not
written by its end is copied before the weights change: a pass is the time when activations take the most memory.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
    event: Any = None  #: of the GPU: the copies are made
    state: "_StateAtBeginning | None" = None  #: on a CPU
    thread: threading.Thread | None = None
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
        self._copies: list[Box] = []  # of a GPU's boxes; kept between saves: pinned memory takes long to allocate
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
        if self._stream is not None:
            copies = self._buffers(boxes)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                _copy(boxes, copies)
                save.event = self._stream.record_event()
            boxes = copies
        else:
            save.state = _StateAtBeginning(boxes)
        save.thread = threading.Thread(target=self._work, args=(save, boxes), name="checkpoint", daemon=True)
        self._under_way = save
        save.thread.start()

    def wait_for_copy(self) -> None:
        """Let what follows change the state: it waits until this rank has copies of what is not written yet."""
        save = self._under_way
        if save is None:
            return
        if save.event is not None:
            torch.cuda.current_stream().wait_event(save.event)
        if save.state is not None and save.error is None:
            save.state.copy_the_rest()

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

    def _work(self, save: _Save, boxes: Sequence[Box]) -> None:
        try:
            if save.event is not None:
                torch.cuda.set_device(self._world.device)  # a thread begins with the first GPU
                save.event.synchronize()
            values_of = None if save.state is None else save.state.take
            save.written = store.write(self._run, self._world.rank, save.marker.step, boxes, values_of)
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            save.error = error
        save.ended = time.monotonic()

    def _buffers(self, boxes: Sequence[Box]) -> list[Box]:
        """Return boxes of host memory with the same places: one block of just the bytes that are saved."""
        if not self._copies:
            sizes = [box.values.numel() for box in boxes]
            block = torch.empty(sum(sizes))
            if block.nbytes:
                # torch's own allocator of pinned memory would round the size up to a power of two.
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
            parts = block.split(sizes)
            self._copies = [
                replace(box, values=part.view(box.values.shape)) for box, part in zip(boxes, parts, strict=True)
            ]
        return self._copies


class _StateAtBeginning:
    """The values of boxes on a CPU when it was made, although the state changes after ``copy_the_rest``.

    Takes memory for the largest box, and then for the boxes that were not taken before.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._lock = threading.Lock()
        self._left = {place: box.values for place, box in enumerate(boxes)}
        # One block for all: torch's writer keeps what it is given until the file is complete.
        self._block = torch.empty(max((box.values.numel() for box in boxes), default=0))
        self.may_change = False

    @torch.no_grad()
    def take(self, place: int) -> Tensor:
        """Return the values of a box, once, in memory that the next call uses again."""
        with self._lock:
            values = self._left.pop(place)
            return self._block[: values.numel()].view(values.shape).copy_(values)

    @torch.no_grad()
    def copy_the_rest(self) -> None:
        """Copy what has not been taken: from now on the state may change."""
        with self._lock:
            if not self.may_change:
                self._left = {place: values.clone() for place, values in self._left.items()}
                self.may_change = True


@torch.no_grad()
def _copy(boxes: Sequence[Box], copies: Sequence[Box]) -> None:
    for box, copy in zip(boxes, copies, strict=True):
        copy.values.copy_(box.values, non_blocking=True)
