"""A keyed work queue: each key is worked on by one worker at a time, soon, and not too often.

It follows client-go's: adding a key that waits already changes nothing but makes it due no later; adding one that is
being worked on makes it due again afterwards; a failed key comes back after a wait that doubles.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
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
        """``clock``: monotonic seconds. ``pause``: least seconds between two passes over one key.

        A failure's wait is ``base`` · 2^(failures - 1) seconds, at most ``longest``, shortened by up to a half at
        random so that what failed together does not come back together.
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
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

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
        if self._heap[0][2] == key:
            self._changed.set()

    async def get(self) -> K:
        """Wait for the next due key and take it. Give it back with ``done`` or ``failed``."""
        # One worker watches the clock; were all of them woken by each change, that would be most of an idle day's work.
        async with self._turn:
            return await self._next()

    async def _next(self) -> K:
        while True:
            self._changed.clear()
            wait = None
            while self._heap:
                when, _, key = self._heap[0]
                if self._due.get(key) != when:
                    heapq.heappop(self._heap)  # it was made due earlier, or taken
                    continue
                wait = when - self._clock()
                if wait <= 0:
                    heapq.heappop(self._heap)
                    del self._due[key]
                    self._busy.add(key)
                    return key
                break
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K, again_in: float | None = None) -> None:
        """Give a key back after a pass that went well; it is due again after ``again_in`` seconds, if given."""
        self._failures.pop(key, None)
        self._give_back(key)
        if again_in is not None:
            self.add(key, again_in)

    def failed(self, key: K, at_least: float = 0.0) -> float:
        """Give a key back after a pass that went wrong; return the seconds until it is due again."""
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
        """Drop what is remembered of a key that is gone for good. It may still be due."""
        self._last.pop(key, None)
        self._failures.pop(key, None)
