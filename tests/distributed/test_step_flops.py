"""The FLOPs of a step, from which its utilization is computed, are the same in every layout."""

from pathlib import Path
from typing import Any

import pytest

from dpo_testing.agents import begin
from dpo_testing.impatient import COUNTING
from dpo_testing.preloaded import usable
from dpo_testing.runs import Finished, kill, merged, run_here
from dpo_testing.training_world import make
from dpo_trainer import training

pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # tests/trainer/test_pace.py counts a rank's work


@pytest.mark.skipif(not usable(), reason="needs forked processes")
@pytest.mark.parametrize(
    ("processes", "parallelism"), [(2, {}), (4, {"tensor": 2, "pipeline": 2}), (4, {"context": 2})]
)
def test_a_step_has_the_flops_of_one_process(
    processes: int, parallelism: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = merged(make(tmp_path, pairs=11), {"training": {"maxSteps": 3, "validationInterval": 100}})
    monkeypatch.setattr(training, "utilization", lambda _spec, flops, *_: flops)
    expected = run_here(spec, tmp_path / "alone").series("train/mfu")
    changes = {"parallelism": {**parallelism, "verify": False}}
    child = begin(merged(spec, changes), tmp_path, processes, **{COUNTING: "1"})
    try:
        code = child.wait(240)
    finally:
        kill(child)
    assert code == 0, (tmp_path / "log").read_text()
    assert len(expected) == 3
    assert min(expected) > 0
    assert Finished(tmp_path / "run").series("train/mfu") == pytest.approx(expected, rel=1e-12)
