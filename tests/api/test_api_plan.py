"""Derived values: steps, batches, intervals and the schedule's parts."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.errors import InvalidDataError
from dpo_api.fields import count
from dpo_api.plan import make_plan
from dpo_testing.manifests import spec


@given(st.integers(0, 9_999), st.integers(0, 99), st.integers(0, 10**9))
def test_percentages_are_exact(fraction: int, whole: int, of: int) -> None:
    exact = Fraction(whole * 10_000 + fraction, 1_000_000)
    assert count(f"{whole}.{fraction:04d}%", of) == max(1, math.floor(exact * of))


@pytest.mark.parametrize(
    ("value", "of", "expected"),
    [
        ("10%", 119, 11),
        ("29%", 100, 29),  # 0.29 * 100 is 28.999... in floats
        ("57%", 100, 57),
        ("100%", 7, 7),
        ("0.5%", 1000, 5),
        ("1%", 5, 1),
        (50, 7, 50),
    ],
)
def test_counts_and_percentages(value: int | str, of: int, expected: int) -> None:
    assert count(value, of) == expected


def test_ultrafeedback_at_512() -> None:
    """61,135 pairs is the data set in the reference's own example of this mistake: M = 119."""
    plan = make_plan(spec({"training.globalBatchSize": 512, "data.validation": [{"uri": "v"}]}), 61_135, [2000])
    assert (plan.steps_per_epoch, plan.total_steps, plan.epochs) == (119, 119, 1)
    assert plan.dropped_per_epoch == 61_135 - 119 * 512
    assert plan.validation_every == 11
    assert (plan.warmup_steps, plan.constant_steps, plan.decay_steps) == (10, 11, 98)
    assert plan.min_learning_rate == pytest.approx(9e-7)
    assert plan.validation_batches == (4,)
    assert plan.warnings == ()


def test_nemo_s_constant_of_1000_is_obeyed_with_a_warning() -> None:
    plan = make_plan(spec({"training.globalBatchSize": 512, "training.schedule.constantSteps": 1000}), 61_135)
    assert (plan.constant_steps, plan.decay_steps) == (1000, 0)
    (warning,) = plan.warnings
    assert str(warning) == (
        "spec.training.schedule: 119 steps are fewer than warm-up 10 + constant 1000: the rate would fall from 9e-6"
        " to 9e-7 at step 11; set constantSteps: 11"
    )


@pytest.mark.parametrize(
    ("steps", "expected"), [(5, 0), (9, 0), (10, 1), (119, 11), (9_999, 999), (10_000, 1000), (50_000, 1000)]
)
def test_constant_steps_left_out(steps: int, expected: int) -> None:
    plan = make_plan(spec({"training.maxSteps": steps, "training.schedule.warmupSteps": 0}), 10_000)
    assert plan.constant_steps == expected
    assert plan.warmup_steps + plan.decay_steps + plan.constant_steps == steps


@pytest.mark.parametrize(
    ("warmup", "constant", "warns"), [(10, 89, False), (10, 90, True), (10, 91, True), (99, 0, False)]
)
def test_the_warning_begins_where_nothing_is_left_to_decay(warmup: int, constant: int, warns: bool) -> None:
    schedule = {"warmupSteps": warmup, "constantSteps": constant}
    plan = make_plan(spec({"training.maxSteps": 100, "training.schedule": schedule}), 10_000)
    assert bool(plan.warnings) is warns
    assert plan.decay_steps == max(0, 100 - warmup - constant)


@pytest.mark.parametrize("warmup", [5, 10, 20])
def test_a_run_within_its_warm_up_is_warned(warmup: int) -> None:
    plan = make_plan(spec({"training.maxSteps": 5, "training.schedule.warmupSteps": warmup}), 10_000)
    assert [w.field for w in plan.warnings] == ["spec.training.schedule.warmupSteps"]
    assert f"5 steps end within the warm-up of {warmup}" in plan.warnings[0].message


def test_the_fix_that_a_warning_names_silences_it() -> None:
    for steps in range(1, 40):
        for warmup in (0, 3, 10):
            for constant in (5, 30, 1000):
                changes = {"warmupSteps": warmup, "constantSteps": constant}
                for _ in range(3):
                    plan = make_plan(spec({"training.maxSteps": steps, "training.schedule": changes}), 10_000)
                    if not plan.warnings:
                        break
                    name, _, value = plan.warnings[0].message.rpartition("; set ")[2].partition(": ")
                    changes = {**changes, name: int(value)}
                assert plan.warnings == (), (steps, warmup, constant, changes)


def test_fewer_pairs_than_a_batch_are_one_smaller_batch() -> None:
    plan = make_plan(spec(), 40)
    assert (plan.global_batch_size, plan.steps_per_epoch, plan.dropped_per_epoch) == (40, 1, 0)
    warning = next(w for w in plan.warnings if w.field == "spec.training.globalBatchSize")
    assert "40 pairs are fewer than one global batch of 64" in warning.message


def test_no_pair_is_an_error() -> None:
    with pytest.raises(InvalidDataError, match=r"spec\.data\.train: no usable pair"):
        make_plan(spec(), 0)


@given(
    pairs=st.integers(1, 5000),
    batch=st.integers(1, 600),
    epochs=st.integers(1, 4),
    drop=st.booleans(),
    limit=st.none() | st.integers(1, 20) | st.sampled_from(["1%", "50%", "100%"]),
)
def test_steps_account_for_every_pair(pairs: int, batch: int, epochs: int, drop: bool, limit: int | str | None) -> None:
    changes = {"globalBatchSize": batch, "epochs": epochs, "dropLast": drop, "limitTrainBatches": limit}
    plan = make_plan(spec({f"training.{name}": value for name, value in changes.items()}), pairs)
    full, rest = divmod(pairs, plan.global_batch_size)
    batches = full + (1 if rest and not drop else 0)
    assert 1 <= plan.steps_per_epoch <= batches
    assert plan.total_steps == epochs * plan.steps_per_epoch
    assert plan.epochs == epochs
    shown = pairs - plan.dropped_per_epoch
    if plan.steps_per_epoch == batches and not drop:
        assert shown == pairs
    else:
        assert shown == min(pairs, plan.steps_per_epoch * plan.global_batch_size)
    if limit is None and drop:
        assert 0 <= plan.dropped_per_epoch < plan.global_batch_size
    assert plan.validation_every >= 1


def test_max_steps_decides_over_epochs() -> None:
    plan = make_plan(spec({"training.maxSteps": 250, "training.epochs": 1}), 64 * 100)
    assert (plan.steps_per_epoch, plan.total_steps, plan.epochs) == (100, 250, 3)


def test_validation_limits_and_intervals() -> None:
    changes = {
        "data.validation": [{"uri": "a"}, {"uri": "b"}, {"uri": "c"}],
        "training.limitValidationBatches": "50%",
        "training.validationInterval": 25,
    }
    plan = make_plan(spec(changes), 6400, [640, 65, 0])
    assert plan.validation_batches == (5, 1, 0)
    assert [step for step in range(101) if plan.validates_after(step)] == [0, 25, 50, 75, 100]


def test_when_it_validates_and_checkpoints() -> None:
    changes = {"training.maxSteps": 105, "training.validateAtStart": False, "checkpoint.everySteps": 50}
    plan = make_plan(spec({**changes, "data.validation": [{"uri": "v"}]}), 6400, [10])
    assert [step for step in range(106) if plan.validates_after(step)] == [*range(10, 101, 10), 105]
    assert [step for step in range(106) if plan.checkpoints_after(step)] == [50, 100, 105]
    nothing = make_plan(spec(changes), 6400)
    assert not any(nothing.validates_after(step) for step in range(106))


def test_micro_batches() -> None:
    assert (make_plan(spec(), 64).pack_max_tokens, make_plan(spec(), 64).pack_max_pairs) == (8192, None)
    one = make_plan(spec({"training.packing.enabled": False, "training.microBatchSize": 4}), 64)
    assert one.pack_max_pairs == 1
    some = make_plan(spec({"training.packing.maxTokens": 10_000, "training.microBatchSize": 4}), 64)
    assert (some.pack_max_tokens, some.pack_max_pairs) == (10_000, 4)


@pytest.mark.parametrize(
    ("changes", "with_rejected", "at_reference"),
    [
        ({}, True, True),
        ({"dpo.sftWeight": 1}, True, True),
        ({"dpo.loss": "rpo_sq"}, True, True),
        ({"dpo.preferenceWeight": 0, "dpo.sftWeight": 1}, False, False),
        ({"lora": {}}, True, True),
        ({"lora": {"rowInit": "xavier"}}, True, False),
    ],
)
def test_what_the_loss_needs(changes: dict[str, object], with_rejected: bool, at_reference: bool) -> None:
    plan = make_plan(spec(changes), 64)
    assert (plan.with_rejected, plan.needs_reference) == (with_rejected, with_rejected)
    assert plan.starts_at_reference is at_reference


def test_a_rate_that_is_constant_by_choice_cannot_fall() -> None:
    """minLearningRate equal to learningRate: without a decay the rate is what was asked for."""
    schedule = {"minLearningRate": 1e-5, "constantSteps": 1000}
    plan = make_plan(spec({"training.learningRate": 1e-5, "training.schedule": schedule}), 61_135)
    assert (plan.decay_steps, plan.min_learning_rate) == (0, plan.learning_rate)
    assert plan.warnings == ()


def test_rates_that_differ_are_written_differently() -> None:
    schedule = {"minLearningRate": 1e-5, "constantSteps": 1000}
    plan = make_plan(spec({"training.learningRate": 1.00000001e-5, "training.schedule": schedule}), 61_135)
    (warning,) = plan.warnings
    assert "the rate would fall from 1.00000001e-5 to 1e-5 at step 11" in str(warning)
