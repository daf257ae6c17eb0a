"""The work queue: one worker a key, nothing forgotten, nothing too often."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_operator.runtime.queue import WorkQueue


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, pause: float = 0.0) -> WorkQueue[str]:
    return WorkQueue(clock=clock, pause=pause, base=1.0, longest=8.0, jitter=lambda: 0.0)


async def take(queue: WorkQueue[str]) -> str | None:
    """Return a key that is due now, or None."""
    try:
        async with asyncio.timeout(0.01):
            return await queue.get()
    except TimeoutError:
        return None


async def body_due_and_delay() -> None:
    clock = Clock()
    queue = make(clock)
    queue.add("late", 5.0)
    queue.add("now")
    queue.add("now", 9.0)  # waits already: due no later for it
    assert queue.depth == 1
    assert await take(queue) == "now"
    assert await take(queue) is None
    queue.add("late", 1.0)  # earlier wins
    clock.now += 1.0
    assert await take(queue) == "late"
    clock.now += 100.0
    assert await take(queue) is None


async def body_one_worker_a_key() -> None:
    clock = Clock()
    queue = make(clock)
    queue.add("a")
    assert await take(queue) == "a"
    queue.add("a")
    assert await take(queue) is None  # somebody works on it
    queue.done("a")
    assert await take(queue) == "a"  # what came meanwhile is not forgotten
    queue.done("a", again_in=3.0)
    assert await take(queue) is None
    clock.now += 3.0
    assert await take(queue) == "a"


async def body_failures_back_off() -> None:
    clock = Clock()
    queue = make(clock)
    waits = []
    queue.add("a")
    for _ in range(5):
        assert await take(queue) == "a"
        queue.add("a")  # news during a failing pass does not shorten the wait
        wait = queue.failed("a")
        assert await take(queue) is None
        waits.append(wait)
        clock.now += wait
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert await take(queue) == "a"
    queue.done("a")
    queue.add("a")
    assert await take(queue) == "a"
    assert queue.failed("a", at_least=6.0) == 6.0  # a Retry-After outranks a first failure's wait


async def body_pause() -> None:
    clock = Clock()
    queue = make(clock, pause=0.5)
    queue.add("a")
    assert await take(queue) == "a"
    queue.done("a")
    queue.add("a")
    assert await take(queue) is None
    clock.now += 0.5
    assert await take(queue) == "a"


@pytest.mark.parametrize("body", [body_due_and_delay, body_one_worker_a_key, body_failures_back_off, body_pause])
def test_queue(body: object) -> None:
    asyncio.run(body())  # type: ignore[operator]


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 5)), max_size=30))
@settings(deadline=None, max_examples=15)
def test_every_key_that_is_added_is_worked_on_afterwards(steps: list[tuple[str, float]]) -> None:
    async def run() -> None:
        clock = Clock()
        queue = make(clock, pause=0.1)
        added: dict[str, float] = {}
        taken: dict[str, float] = {}
        for key, wait in steps:
            queue.add(key, wait)
            added[key] = clock.now
            clock.now += wait / 3
            while (got := await take(queue)) is not None:
                taken[got] = clock.now
                queue.done(got)
        for _ in range(60):
            clock.now += 0.5
            while (got := await take(queue)) is not None:
                taken[got] = clock.now
                queue.done(got)
        assert all(taken[key] >= moment for key, moment in added.items())
        assert queue.depth == 0

    asyncio.run(run())


def test_a_worker_that_is_cancelled_takes_no_key_along() -> None:
    """A key may have been handed to it already, in the same turn of the loop."""

    async def scenario() -> str:
        queue: WorkQueue[str] = WorkQueue(clock=time.monotonic)
        first, second = asyncio.create_task(queue.get()), asyncio.create_task(queue.get())
        await asyncio.sleep(0.01)
        queue.add("a")
        first.cancel()
        async with asyncio.timeout(30):
            return await second

    assert asyncio.run(scenario()) == "a"


def test_every_waiting_worker_gets_a_key_and_none_is_woken_for_nothing() -> None:
    async def scenario() -> tuple[set[int], int]:
        queue: WorkQueue[int] = WorkQueue(clock=time.monotonic)
        workers = [asyncio.create_task(queue.get()) for _ in range(32)]
        await asyncio.sleep(0.01)
        for key in range(31):
            queue.add(key, delay=0.02 + key % 3 * 0.01)
        async with asyncio.timeout(30):
            while sum(worker.done() for worker in workers) < 31:
                await asyncio.sleep(0.005)
        got = {worker.result() for worker in workers if worker.done()}
        left = sum(not worker.done() for worker in workers)
        for worker in workers:
            worker.cancel()
        return got, left

    assert asyncio.run(scenario()) == (set(range(31)), 1)
