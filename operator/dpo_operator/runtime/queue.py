"""A keyed work queue: one worker at a time per key, with delays and back-off.

It follows client-go's queue: adding a key that already waits can only make it due earlier; adding one that is being
processed makes it due again afterwards; a failed key is retried after a delay that doubles.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Hashable


class WorkQueue[K: Hashable]:
    """Keys in the order in which they are due. Use from one event loop."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        pause: float = 0.1,
        base: float = 0.5,
        longest: float = 60.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """``clock``: monotonic seconds. ``pause``: minimum seconds between two passes over one key.

        A failure's wait is ``base`` · 2^(failures - 1) seconds, at most ``longest``, shortened by up to a half at
        random so that keys that failed together are not retried together.
        """
        self._clock = clock
        self._pause = pause
        self._base = base
        self._longest = longest
        self._jitter = jitter
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = itertools.count()
        self._busy: set[K] = set()
        self._again: dict[K, float] = {}
        self._last: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._waiting: deque[asyncio.Future[K]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def depth(self) -> int:
        """Keys that are due now and wait for a worker."""
        now = self._clock()
        return sum(due <= now for due in self._due.values())

    def oldest(self) -> float:
        """Seconds that the longest-waiting due key has waited; 0 when none is due."""
        now = self._clock()
        return max(0.0, *(now - due for due in self._due.values())) if self._due else 0.0

    def add(self, key: K, delay: float = 0.0) -> None:
        """Make a key due in ``delay`` seconds, or earlier if it was."""
        when = self._clock() + max(0.0, delay)
        if key in self._busy:
            self._again[key] = min(when, self._again.get(key, when))
        else:
            self._schedule(key, when)

    def _schedule(self, key: K, when: float) -> None:
        if key in self._last:
            when = max(when, self._last[key] + self._pause)
        if key in self._due and self._due[key] <= when:
            return
        self._due[key] = when
        heapq.heappush(self._heap, (when, next(self._order), key))
        if self._waiting and self._heap[0][2] == key:
            self._deal()

    async def get(self) -> K:
        """Wait for the next due key and take it. Give it back with ``done`` or ``failed``."""
        await asyncio.sleep(0)  # a hundred keys that are due at once must not block the event loop
        key = self._take()
        if key is not None:
            return key
        waiter: asyncio.Future[K] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._deal()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._busy.discard(waiter.result())
                self.add(waiter.result())
            raise

    def _first(self) -> float | None:
        """Return when the first key is due."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)  # it was made due earlier, or taken
        return self._heap[0][0] if self._heap else None

    def _take(self) -> K | None:
        """Take the first key, if it is due."""
        first = self._first()
        if first is None or first > self._clock():
            return None
        _, _, key = heapq.heappop(self._heap)
        del self._due[key]
        self._busy.add(key)
        return key

    def _deal(self) -> None:
        """Give due keys to waiting workers, and set the timer for the next one.

        All workers share one timer: with one each, an idle process would spend most of its CPU time on timers.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()  # it was cancelled
                continue
            key = self._take()
            if key is None:
                first = self._first()
                if first is not None:
                    wait = max(0.001, first - self._clock())
                    self._timer = asyncio.get_running_loop().call_later(wait, self._deal)
                return
            self._waiting.popleft().set_result(key)

    def done(self, key: K, again_in: float | None = None) -> None:
        """Give a key back after a successful pass; it is due again after ``again_in`` seconds, if given."""
        self._failures.pop(key, None)
        self._give_back(key)
        if again_in is not None:
            self.add(key, again_in)

    def failed(self, key: K, at_least: float = 0.0) -> float:
        """Give a key back after a failed pass; return the seconds until it is due again."""
        failures = self._failures.get(key, 0) + 1
        self._failures[key] = failures
        wait = min(self._longest, self._base * 2.0 ** min(failures - 1, 30)) * (1 - self._jitter() / 2)
        wait = max(wait, at_least)
        self._give_back(key, not_before=self._clock() + wait)
        self.add(key, wait)
        return wait

    def _give_back(self, key: K, not_before: float = 0.0) -> None:
        self._busy.discard(key)
        self._last[key] = self._clock()
        again = self._again.pop(key, None)
        if again is not None:
            self._schedule(key, max(again, not_before))

    def forget(self, key: K) -> None:
        """Forget the failures of a key whose job was deleted. The key may still be due."""
        self._last.pop(key, None)
        self._failures.pop(key, None)
