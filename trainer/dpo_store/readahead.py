"""Reading ahead of the caller, in a fixed amount of memory."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator

Source = Callable[[Callable[[], bool]], Generator[bytes]]
"""cancelled -> blocks of bytes. It is closed when no more are wanted, and may end early once ``cancelled()``."""


def stream(source: Source, ahead: int) -> Iterator[bytes]:
    """Yield the blocks of ``source``, which a thread reads while the caller works on those before.

    At most ``ahead`` bytes are held, and two blocks. 0: no thread, the caller reads.
    """
    if ahead < 0:
        raise ValueError(f"ahead must be at least 0, not {ahead}")
    if ahead == 0:
        with contextlib.closing(source(lambda: False)) as blocks:
            yield from blocks
        return
    reader = _Reader(source, ahead)
    # A daemon: a read that hangs ends by its own time-out, and must not keep the process from ending before.
    threading.Thread(target=reader.run, name="dpo-store", daemon=True).start()
    try:
        while (block := reader.take()) is not None:
            yield block
    finally:
        reader.cancel()


class _Reader:
    """What a thread has read and the caller has not yet taken."""

    def __init__(self, source: Source, ahead: int) -> None:
        self._source = source
        self._ahead = ahead
        self._changed = threading.Condition()
        self._blocks: deque[bytes] = deque()
        self._held = 0
        self._ended = False
        self._error: BaseException | None = None
        self._cancelled = False

    def run(self) -> None:
        """Read the source to its end, or until the caller wants no more."""
        try:
            with contextlib.closing(self._source(lambda: self._cancelled)) as blocks:
                for block in blocks:
                    if not self._give(block):
                        break
        except BaseException as error:  # noqa: BLE001 (raised where the caller takes)
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _give(self, block: bytes) -> bool:
        with self._changed:
            self._blocks.append(block)
            self._held += len(block)
            self._changed.notify()
            if self._held >= self._ahead:
                # Until half is gone: else the two threads would wake each other for every block.
                self._changed.wait_for(lambda: self._cancelled or self._held <= self._ahead // 2)
            return not self._cancelled

    def take(self) -> bytes | None:
        """Return the next block, None at the end. Raises what the source raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._blocks or self._ended)
            if self._blocks:
                block = self._blocks.popleft()
                self._held -= len(block)
                if self._held <= self._ahead // 2:
                    self._changed.notify()
                return block
        if self._error is not None:
            raise self._error
        return None

    def cancel(self) -> None:
        """Have the thread close the source after the block that it is reading."""
        with self._changed:
            self._cancelled = True
            self._blocks.clear()
            self._changed.notify()
