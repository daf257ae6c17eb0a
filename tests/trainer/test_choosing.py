"""The best validation, and the end of a run: by tables of validations."""

import json
import math
from typing import Any

import pytest

from dpo_api.spec import DPOJobSpec
from dpo_testing.manifests import manifest
from dpo_trainer.choosing import Chooser

NAN, INF = math.nan, math.inf


def chooser(monitor: str | None = None, **early: Any) -> Chooser:
    changes: dict[str, Any] = {"spec.data.validation": [{"uri": "v.jsonl"}]}
    if monitor is not None:
        changes["spec.checkpoint.monitor"] = monitor
    if early:
        changes["spec.training.earlyStopping"] = early
    return Chooser(DPOJobSpec.model_validate(manifest(changes)["spec"]))


def feed(to: Chooser, metric: str, *values: float, first: int = 1) -> Chooser:
    """Validations after the steps ``first``, ``first`` + 1, …"""
    for step, value in enumerate(values, first):
        to.validated(step, {metric: value, "val/other": -1e9})
    return to


def best(metric: str, *values: float) -> tuple[int, float] | None:
    found = feed(chooser(metric), metric, *values).best
    return None if found is None else (found.step, found.value)


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("val/loss", (0.7, 0.5, 0.6), (2, 0.5)),
        ("val/preference_loss", (0.7, 0.5, 0.4), (3, 0.4)),
        ("val/acc", (0.5, 0.9, 0.7), (2, 0.9)),
        ("val/rewards_margin", (-1.0, -0.5, -0.7), (2, -0.5)),
        ("val/loss", (0.5, 0.5, 0.5), (1, 0.5)),
        ("val/acc", (1.0, 1.0), (1, 1.0)),
        ("val/loss", (NAN, 0.9, NAN), (2, 0.9)),
        ("val/loss", (NAN, INF, -INF), None),
        ("val/acc", (INF, 0.1, NAN), (2, 0.1)),
    ],
)
def test_the_best(metric: str, values: tuple[float, ...], expected: tuple[int, float] | None) -> None:
    assert best(metric, *values) == expected


def test_what_is_not_monitored_has_no_best() -> None:
    assert feed(chooser(), "val/loss", 0.5).best is None
    assert feed(chooser("val/acc"), "val/loss", 0.5).best is None


def test_the_validation_before_the_first_step_does_not_count() -> None:
    found = feed(chooser("val/loss", patience=1), "val/loss", 0.1, 0.5, first=0)
    assert found.best is not None
    assert (found.best.step, found.stops_early) == (1, "")


@pytest.mark.parametrize(
    ("early", "values", "ends_after"),
    [
        ({"patience": 1}, (0.5, 0.5), 2),
        ({"patience": 2}, (0.5, 0.6, 0.4, 0.5, 0.4), 5),
        ({"patience": 2}, (0.5, 0.6, 0.4, 0.5), None),
        ({"patience": 2}, (0.5, NAN, NAN), 3),
        ({"patience": 2}, (NAN, NAN), 2),
        # 0.45 is not better than 0.5 by more than 0.1, 0.35 is: small gains add up.
        ({"patience": 2, "minDelta": 0.1}, (0.5, 0.45, 0.35, 0.3, 0.26), 5),
        ({"patience": 2, "minDelta": 0.125}, (0.5, 0.375, 0.375), 3),
        ({"monitor": "val/acc", "patience": 2}, (0.5, 0.6, 0.4, 0.6), 4),
    ],
)
def test_the_end(early: dict[str, Any], values: tuple[float, ...], ends_after: int | None) -> None:
    metric = early.get("monitor", "val/loss")
    counted = [bool(feed(chooser(**early), metric, *values[:n]).stops_early) for n in range(1, len(values) + 1)]
    assert (counted.index(True) + 1 if True in counted else None) == ends_after


def test_early_stopping_takes_the_monitor_of_the_checkpoints() -> None:
    assert feed(chooser("val/acc", patience=1), "val/acc", 0.5, 0.4).stops_early.startswith("val/acc has not improved")


@pytest.mark.parametrize(
    ("early", "values", "said"),
    [
        (
            {"patience": 2, "minDelta": 0.001},
            (0.5123, 0.6, 0.6),
            "val/loss has not improved by more than 0.001 in 2 validations since step 1, where it was 0.512",
        ),
        ({"patience": 1}, (NAN,), "val/loss was not finite in 1 validation"),
    ],
)
def test_the_reason_names_metric_count_and_value(early: dict[str, Any], values: tuple[float, ...], said: str) -> None:
    assert feed(chooser(**early), "val/loss", *values).stops_early == said


def test_a_resumed_run_goes_on_where_it_was() -> None:
    values = (0.6, 0.5, 0.7, 0.5, 0.55)
    whole = feed(chooser("val/loss", patience=3), "val/loss", *values)
    for cut in range(len(values)):
        before = feed(chooser("val/loss", patience=3), "val/loss", *values[:cut])
        after = chooser("val/loss", patience=3)
        assert after.restore(json.loads(json.dumps(before.state())), range(9)) == []
        feed(after, "val/loss", *values[cut:], first=cut + 1)
        assert (after.state(), after.stops_early) == (whole.state(), whole.stops_early)
    assert whole.stops_early


def test_a_checkpoint_of_a_version_without_a_choice_is_resumed() -> None:
    found = chooser("val/loss", patience=1)
    assert found.restore({}, [4]) == []
    assert (found.best, found.stops_early) == (None, "")


def test_another_metric_begins_anew() -> None:
    state = feed(chooser("val/acc", patience=1), "val/acc", 0.5, 0.4).state()
    found = chooser("val/loss", patience=1)
    assert found.restore(state, [1, 2]) == []
    assert (found.best, found.stops_early) == (None, "")


def test_a_best_checkpoint_that_is_gone_is_not_the_best() -> None:
    state = feed(chooser("val/loss"), "val/loss", 0.5, 0.6).state()
    found = chooser("val/loss")
    (said,) = found.restore(state, [2])
    assert "of step 1, is no longer there" in said
    assert found.best is None
