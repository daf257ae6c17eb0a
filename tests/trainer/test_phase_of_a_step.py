"""The progress that is reported during a step."""

from pathlib import Path
from typing import Any

import pytest

from dpo_testing.runs import merged, run_here
from dpo_testing.training_world import make
from dpo_trainer.engine import Engine
from dpo_trainer.reporting import Reporter
from dpo_trainer.rundir import RunDirectory

pytestmark = pytest.mark.slow


def test_a_step_is_seen_as_training_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as what came before it: who watches for stalls does not judge a checkpoint, which may be long."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    changes = {"training": {"maxSteps": 2, "validationInterval": 100}, "checkpoint": {"everySteps": 1}}
    spec = merged(make(tmp_path, pairs=8), changes)
    reporters: list[Reporter] = []
    during: list[tuple[int, str]] = []
    begin, train_step = Reporter.begin, Engine.train_step

    def begun(self: Reporter, directory: RunDirectory, *more: Any) -> None:
        reporters.append(self)
        begin(self, directory, *more)

    def watched(self: Engine, *args: Any, **kwargs: Any) -> dict[str, float]:
        hub = reporters[-1]._hub
        assert hub is not None
        during.append((hub.progress.newest.step, hub.progress.newest.phase))
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(Reporter, "begin", begun)
    monkeypatch.setattr(Engine, "train_step", watched)
    run_here(spec, tmp_path / "run")
    assert during == [(0, "train"), (1, "train")], "after a validation, and after a checkpoint"
    run_here(merged(spec, {"training": {"maxSteps": 3}}), tmp_path / "run")
    assert during[2:] == [(2, "train")], "after the model and the checkpoint were loaded"
