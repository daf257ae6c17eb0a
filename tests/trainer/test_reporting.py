"""What a run reports: nothing before there is news, and from the start everything that is already known."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dpo_api.metrics import METRICS
from dpo_testing.runs import merged, run_here
from dpo_testing.training_world import make
from dpo_trainer import engine, reporting, training
from dpo_trainer.pace import Slow
from dpo_trainer.reporting import Reporter, memory_metrics
from dpo_trainer.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two steps; validations before the first and after the last, of two sources."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    made = make(tmp_path, pairs=8)
    sources = [{**made["data"]["validation"][0], "name": name} for name in ("one", "other")]
    training = {"maxSteps": 2, "validationInterval": 100}
    return merged(made, {"data": {"validation": sources}, "training": training})


def gauges(reporter: Reporter) -> dict[str, float]:
    assert reporter._hub is not None
    families = reporter._hub.prometheus.collect()
    return {sample.name: sample.value for family in families for sample in family.samples}


def progress(reporter: Reporter) -> dict[str, float]:
    assert reporter._hub is not None
    return dict(reporter._hub.progress.newest.metrics)


def verdicts(names: dict[str, float]) -> set[str]:
    """Those of validation that would be taken for a verdict on the policy."""
    return {name for name in names if "val" in name and (name.endswith("acc") or "reward" in name)}


def test_the_validation_before_the_first_step_passes_no_verdict(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and reference are equal then: an accuracy of 0 and margins of rounding would raise alarms for hours."""
    stepped = Reporter.stepped
    after_one: list[dict[str, float]] = []

    def watched(self: Reporter, step: int, *args: Any, **kwargs: Any) -> None:
        stepped(self, step, *args, **kwargs)
        if step == 1:
            after_one.extend((gauges(self), progress(self), self.finite_latest))

    at_end: list[dict[str, float]] = []
    monkeypatch.setattr(Reporter, "stepped", watched)
    run = run_here(spec, tmp_path / "run", lambda run: at_end.extend((gauges(run.reporter), progress(run.reporter))))
    assert [verdicts(seen) for seen in after_one] == [set()] * 3
    assert {"dpo_val_loss", "dpo_val_preference_loss", "dpo_val_last_run_timestamp_seconds"} <= after_one[0].keys()
    assert {"val/loss", "val/preference_loss", "val/one/loss", "train/acc"} <= after_one[1].keys()
    assert {"dpo_val_reward_accuracy_ratio", "dpo_val_reward_margin", "dpo_val_reward_stddev"} <= at_end[0].keys()
    assert {"val/acc", "val/other/acc", "val/rewards_margin", "val/other/rewards_all_std"} <= at_end[1].keys()
    assert run.events[0]["step"] == 0
    assert {"val/acc", "val/rewards_margin", "val/one/acc"} <= run.events[0].keys(), "the record holds everything"


def test_a_run_exports_exactly_the_rows_of_the_table(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, types, labels and help texts of /metrics after a run that uses everything, on GPUs and beside others."""
    monkeypatch.setattr(reporting, "memory_metrics", lambda *_: memory_metrics(3, 4))
    monkeypatch.setattr(training, "utilization", lambda *_: 0.4)
    monkeypatch.setattr(engine, "slowest", lambda _: Slow(0, 1.0))
    found: dict[str, Metric] = {}

    def look(run: Run) -> None:
        assert run.reporter._hub is not None
        text = generate_latest(run.reporter._hub.prometheus.registry).decode()
        found.update({family.name: family for family in text_string_to_metric_families(text)})

    run_here(merged(spec, {"dpo": {"sftWeight": 0.1}, "checkpoint": {"monitor": "val/loss"}}), tmp_path / "run", look)
    rows = {row.family: row for row in METRICS}
    assert set(found) == set(rows)
    for name, family in found.items():
        row = rows[name]
        assert (family.type, family.documentation) == (row.kind, row.help), name
        assert family.samples, name
        for sample in family.samples:
            assert (sample.name, set(sample.labels)) == (row.name, set(row.labels))


BEST = {"dpo_checkpoint_best_value", "dpo_checkpoint_best_step"}


def test_the_best_validation_is_nan_until_there_is_one(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That before the first step does not count."""
    stepped = Reporter.stepped
    after: dict[int, dict[str, float]] = {}

    def watched(self: Reporter, step: int, *args: Any, **kwargs: Any) -> None:
        stepped(self, step, *args, **kwargs)
        after[step] = {name: value for name, value in gauges(self).items() if name in BEST}

    def at_end(run: Run) -> None:
        after[3] = {name: value for name, value in gauges(run.reporter).items() if name in BEST}

    monkeypatch.setattr(Reporter, "stepped", watched)
    changes = {"checkpoint": {"monitor": "val/rewards_margin"}, "training": {"validationInterval": 1}}
    run = run_here(merged(spec, changes), tmp_path / "run", at_end)
    assert after[1].keys() == BEST
    assert all(math.isnan(value) for value in after[1].values())
    margins = {event["step"]: event["val/rewards_margin"] for event in run.events if event.get("val/rewards_margin")}
    assert after[2] == {"dpo_checkpoint_best_value": margins[1], "dpo_checkpoint_best_step": 1}
    best = max((1, 2), key=lambda step: margins[step])
    assert after[3] == {"dpo_checkpoint_best_value": margins[best], "dpo_checkpoint_best_step": best}


def test_a_run_that_monitors_nothing_has_no_best_validation(spec: dict[str, Any], tmp_path: Path) -> None:
    seen: set[str] = set()
    run_here(spec, tmp_path / "run", lambda run: seen.update(gauges(run.reporter)))
    assert "dpo_checkpoint_last_step" in seen
    assert not seen & BEST


def test_a_resumed_run_says_which_checkpoint_it_has_and_how_old_it_is(spec: dict[str, Any], tmp_path: Path) -> None:
    began = time.time()
    run = run_here(spec, tmp_path / "run")
    marker = run.folder / "checkpoints" / "step-000002" / "complete.json"
    words = json.loads(marker.read_text())
    assert began <= words["saved_at"] <= time.time()

    def resumed(**changes: Any) -> tuple[float | None, float | None]:
        """Step and time that the gauges show, of an attempt that only writes the model again: it saves nothing."""
        found: dict[str, float] = {}

        def look(run: Run) -> None:
            found.update(gauges(run.reporter))

        (run.folder / "export.json").unlink()
        marker.write_text(json.dumps(words | changes))
        run_here(spec, run.folder, look)
        return found.get("dpo_checkpoint_last_step"), found.get("dpo_checkpoint_last_success_timestamp_seconds")

    assert resumed(saved_at=1_700_000_000.5) == (2, 1_700_000_000.5)
    assert resumed(saved_at=None) == (2, None), "a time that nobody wrote down is not guessed"
