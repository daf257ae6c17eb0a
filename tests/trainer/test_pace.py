"""The time of a rank's own part of a step, and which rank is slower."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dpo_api.models import ModelConfig
from dpo_api.sizing import Work
from dpo_trainer.model.pack import Pack, Segment
from dpo_trainer.pace import SLOW_STEPS, OwnTime, Slow, Slowness, slowest, work_of


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> OwnTime:
    """On a clock that advances one second each time it is read."""
    ticks: Iterator[int] = iter(range(1000))
    monkeypatch.setattr("dpo_trainer.pace.time.monotonic", lambda: float(next(ticks)))
    return OwnTime(torch.device("cpu"))


def test_passes_count_and_messages_do_not(own: OwnTime) -> None:
    own.begin(prepared=0.5)
    for name in ("forward-backward", "forward-recv", "forward-compute", "backward-compute", "all-grads-sync"):
        own(name, log_level=2).start()
        own(name).stop()
    own.end()
    assert own.seconds == 0.5 + 2


def test_a_wait_within_a_pass_does_not_count(own: OwnTime) -> None:
    called: list[Any] = []
    wait = own.without(lambda *arguments, **options: called.append((arguments, options)))
    own.begin(prepared=0)
    wait("before")
    own("forward-compute").start()  # at 0
    wait("within", skip=True)  # from 1 to 2
    own("forward-compute").stop()  # at 3
    own.end()
    assert own.seconds == 3 - 1
    assert called == [(("before",), {}), (("within",), {"skip": True})]


def test_a_validation_does_not_count(own: OwnTime) -> None:
    own.begin(prepared=1.0)
    own.end()
    own("forward-compute").start()
    own("forward-compute").stop()
    assert own.seconds == 1.0


def ranks(*rows: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1, 8, 0)], None),
        ([(1, 8, 0), (3, 8, 0)], Slow(1, 3.0)),
        ([(3, 24, 0), (2, 16, 0), (3, 12, 0)], Slow(2, 2.0)),  # by work: 1/8, 1/8 and 1/4 s
        ([(1, 8, 0), (1, 8, 0), (9, 8, 1), (18, 8, 1)], Slow(3, 2.0)),  # the last stage has the LM head
        ([(1, 8, 0), (9, 8, 1)], None),  # each alone in its stage
        ([(1, 8, 0), (1, 1, 0)], None),  # a filler's pack is overhead
        (
            [(1, 8, 0), (0, 0, 0), (2, 8, 0), (0, 0, 0)],
            Slow(2, 2.0),
        ),  # one of each pair has numbers
        ([(0, 0, 0), (0, 0, 0)], None),  # no step yet
    ],
)
def test_the_slowest(rows: list[tuple[float, float, float]], expected: Slow | None) -> None:
    assert slowest(ranks(*rows)) == expected


def test_several_steps_in_a_row_make_a_rank_slow() -> None:
    slowness = Slowness()
    for step in range(SLOW_STEPS):
        assert slowness.now is None
        slowness.add(Slow(3, 2.0 + step))
    assert slowness.now == Slow(3, 4.0)
    slowness.add(Slow(1, 1.1))
    assert slowness.now == Slow(3, 4.0), "one step is no recovery"
    for _ in range(SLOW_STEPS - 1):
        slowness.add(Slow(3, 1.4))
    assert slowness.now is None


def test_ranks_that_are_slow_in_turn_are_not_reported() -> None:
    slowness = Slowness()
    for step in range(3 * SLOW_STEPS):
        slowness.add(Slow(step % 2, 5.0))
    assert slowness.now is None


def test_another_slow_rank_takes_its_place() -> None:
    slowness = Slowness()
    for rank in (3, 4):
        for _ in range(SLOW_STEPS):
            slowness.add(Slow(rank, 2.0))
    assert slowness.now == Slow(4, 2.0)


def pack_of(*segments: Segment, rows: int, padding: int) -> Pack:
    size = segments[-1].end + padding
    empty = torch.zeros(size, dtype=torch.int64)
    few = torch.zeros(rows, dtype=torch.int64)
    return Pack(empty, empty, empty, segments, few, few, few, torch.zeros(1, dtype=torch.int64))


def test_the_work_of_packs() -> None:
    """A prompt of 4 with responses of 2 and 3, in a layer with a window of 3 and two without; padding is no work."""
    config = ModelConfig("mistral", 10, 8, 8, 3, 2, 1, 4, window=3, windowed_layers=(True, False, False))
    shared = pack_of(Segment(0, 4), Segment(4, 6, 0), Segment(6, 9, 0), rows=5, padding=7)
    whole = (1 + 2 + 3 + 4) + (5 + 6) + (5 + 6 + 7)
    window = (1 + 2 + 3 + 3) + (3 + 3) + (3 + 3 + 3)
    assert work_of([shared], config) == Work(tokens=9, rows=5, seen=2 * whole + window)
    assert work_of([shared, shared], config).seen == 2 * (2 * whole + window)
    half = replace(shared, rows=shared.rows[:2], context_size=2)
    assert work_of([half], config) == Work(4.5, 2, (2 * whole + window) / 2), "of two context-parallel ranks"
