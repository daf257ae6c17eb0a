"""Streaming: range requests ahead of the reader, in a fixed amount of memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

Fetch = Callable[[int, int, Callable[[], bool]], list[bytes]]
"""(start, stop, cancelled) -> the bytes [start, stop) in blocks; may return early once ``cancelled()``."""


def stream(fetch: Fetch, start: int, stop: int, chunk: int, read_ahead: int) -> Iterator[bytes]:
    """Yield the bytes [start, stop) in order, in blocks no longer than ``chunk``.

    While the caller works on one chunk, ``read_ahead`` more are being fetched by as many threads (0: none, and the
    caller's own thread fetches). At most ``(read_ahead + 1) * chunk`` bytes of the object are held, plus
    ``read_ahead`` blocks (0.25 MiB each) and the buffers of as many connections (below 1 MiB each): a finished chunk
    is given away block by block, and the next one is asked for only after the first block of the last is due.
    """
    if chunk < 1 or read_ahead < 0:
        raise ValueError(f"chunk must be at least 1 and read_ahead at least 0, not {chunk} and {read_ahead}")
    spans = ((at, min(at + chunk, stop)) for at in range(start, stop, chunk))
    if read_ahead == 0:
        for span in spans:
            yield from _given_away(fetch(*span, lambda: False))
        return
    cancelled = threading.Event()
    pool = ThreadPoolExecutor(max_workers=read_ahead, thread_name_prefix="dpo-store")
    waiting: deque[Future[list[bytes]]] = deque()

    def ask() -> None:
        span = next(spans, None)
        if span is not None:
            waiting.append(pool.submit(fetch, *span, cancelled.is_set))

    try:
        for _ in range(read_ahead):
            ask()
        while waiting:
            blocks = waiting.popleft().result()
            ask()
            yield from _given_away(blocks)
    finally:
        cancelled.set()
        # No waiting: a request that hangs ends by its own time-out.
        pool.shutdown(wait=False, cancel_futures=True)


def _given_away(blocks: list[bytes]) -> Iterator[bytes]:
    """Yield the blocks and forget each as it goes."""
    blocks.reverse()
    while blocks:
        yield blocks.pop()
