"""The learning rate against closed forms at every kind of step, edges included."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_trainer.schedule import learning_rate

HIGH, LOW = 9e-6, 9e-7


def rates(warmup: int, constant: int, total: int, count: int | None = None) -> list[float]:
    return [
        learning_rate(
            step,
            max_learning_rate=HIGH,
            min_learning_rate=LOW,
            warmup_steps=warmup,
            constant_steps=constant,
            total_steps=total,
        )
        for step in range(total + 3 if count is None else count)
    ]


def test_with_a_constant_part() -> None:
    """W = 4, D = 8, C = 3, M = 15."""
    got = rates(4, 3, 15)
    assert got[:5] == pytest.approx([0, HIGH / 4, HIGH / 2, 3 * HIGH / 4, HIGH])
    assert got[8] == pytest.approx((HIGH + LOW) / 2), "half-way through the cosine"
    assert got[6] == pytest.approx(LOW + (HIGH - LOW) * (1 + math.sqrt(0.5)) / 2), "a quarter of the way"
    assert got[10] == pytest.approx(LOW + (HIGH - LOW) * (1 - math.sqrt(0.5)) / 2)
    assert got[12:] == pytest.approx([LOW] * 6), "from W + D on, beyond M too"


def test_without_a_constant_part() -> None:
    """C = 0: the warm-up starts above zero and ends at W with the full rate; the cosine spans M − W."""
    got = rates(4, 0, 12)
    assert got[:5] == pytest.approx([HIGH / 5, 2 * HIGH / 5, 3 * HIGH / 5, 4 * HIGH / 5, HIGH])
    assert got[8] == pytest.approx((HIGH + LOW) / 2)
    assert got[11] > LOW, "the last update is still above the minimum"
    assert got[12:] == pytest.approx([LOW] * 3)


@pytest.mark.parametrize("constant", [0, 3])
def test_no_warm_up_starts_at_the_full_rate(constant: int) -> None:
    got = rates(0, constant, 10)
    span = 10 - constant
    assert got[0] == HIGH
    assert got[1] == pytest.approx(LOW + (HIGH - LOW) * (1 + math.cos(math.pi / span)) / 2)
    assert got[span] == pytest.approx(LOW)


def test_no_decay_step_falls_right_after_the_warm_up() -> None:
    """D = 0: W = 4, C = 6, M = 10."""
    assert rates(4, 6, 10) == pytest.approx([0, HIGH / 4, HIGH / 2, 3 * HIGH / 4, HIGH] + [LOW] * 8)


def test_defaults_on_a_short_run_fall_after_ten_steps() -> None:
    """NeMo's defaults on UltraFeedback: D = 119 − 10 − 1000 < 0, the trap that the plan warns of."""
    got = rates(10, 1000, 119, count=119)
    assert got[:11] == pytest.approx([HIGH * step / 10 for step in range(11)])
    assert got[11:] == pytest.approx([LOW] * 108)


def test_nothing_but_a_constant_part() -> None:
    assert rates(0, 10, 10) == [LOW] * 13
    assert rates(0, 20, 10) == [LOW] * 13


def test_warm_up_longer_than_the_run() -> None:
    assert rates(10, 0, 5, count=5) == pytest.approx([HIGH * (step + 1) / 11 for step in range(5)])


def test_constant_rate_after_the_warm_up() -> None:
    """The tutorial's own advice: minimum = maximum is a constant rate after ten warm-up steps."""
    got = [
        learning_rate(
            step, max_learning_rate=9e-7, min_learning_rate=9e-7, warmup_steps=10, constant_steps=1000, total_steps=119
        )
        for step in range(119)
    ]
    assert got[0] == 0
    assert got[10:] == [9e-7] * 109


@given(
    warmup=st.integers(0, 30),
    constant=st.integers(0, 60),
    total=st.integers(0, 80),
    low=st.floats(0, 1),
    high=st.floats(1, 2),
)
def test_rises_then_falls_within_its_bounds(warmup: int, constant: int, total: int, low: float, high: float) -> None:
    got = [
        learning_rate(
            step,
            max_learning_rate=high,
            min_learning_rate=low,
            warmup_steps=warmup,
            constant_steps=constant,
            total_steps=total,
        )
        for step in range(max(total, warmup) + 2)
    ]
    rise, fall = got[: warmup + 1], got[max(warmup, 1) :]
    if warmup:
        assert rise == sorted(rise)
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(fall))
    assert all(low - 1e-15 <= rate <= high for rate in fall)


@pytest.mark.parametrize("bad", [{"step": -1}, {"warmup_steps": -1}, {"constant_steps": -2}, {"total_steps": -1}])
def test_negative_counts_are_refused(bad: dict[str, int]) -> None:
    numbers = {"step": 0, "warmup_steps": 1, "constant_steps": 1, "total_steps": 5} | bad
    with pytest.raises(ValueError, match="negative"):
        learning_rate(
            numbers["step"],
            max_learning_rate=HIGH,
            min_learning_rate=LOW,
            warmup_steps=numbers["warmup_steps"],
            constant_steps=numbers["constant_steps"],
            total_steps=numbers["total_steps"],
        )


def test_minimum_above_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="minimum rate 9e-06"):
        learning_rate(0, max_learning_rate=LOW, min_learning_rate=HIGH, warmup_steps=1, constant_steps=1, total_steps=5)
