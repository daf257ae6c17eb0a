"""Every family's DPO run over two tensor-parallel processes is the run of one process."""

from pathlib import Path
from typing import Any

import pytest

from dpo_testing.models import VARIANTS
from dpo_testing.runs import merged, run_here, run_processes
from dpo_testing.training_world import make
from dpo_testing.trajectories import differences

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("families")]

STEADY = {"maxSteps": 5, "learningRate": 5e-4, "validationInterval": 4, "eps": 1e-6}
SPLIT: dict[str, dict[str, Any]] = {"TP2": {"tensor": 2}, "TP2, sequence": {"tensor": 2, "sequence": True}}
CHOSEN = {("nemotron", "TP2, sequence")}
"""In `make test`: those with the most parts of their own. The others are nightly."""


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        pytest.param(variant, layout, marks=[] if (variant, layout) in CHOSEN else [pytest.mark.nightly])
        for variant in VARIANTS
        for layout in SPLIT
    ],
)
def test_two_tensor_parallel_processes_are_one_trajectory(variant: str, layout: str, tmp_path: Path) -> None:
    spec = merged(make(tmp_path, pairs=11, variant=variant), {"training": STEADY})
    alone = run_here(spec, tmp_path / "alone")
    losses = alone.series("train/preference_loss")
    assert losses[-1] < losses[0] - 0.1
    # A reference of its own: computed in this layout, not read from the other run's cache.
    changed = merged(spec, {"parallelism": SPLIT[layout], "reference": {"cacheURI": str(tmp_path / "its reference")}})
    split = run_processes(changed, tmp_path / "split", processes=2, scratch=tmp_path / "scratch")
    assert differences(alone, split) == []
    assert "layout verified: " in (tmp_path / "scratch" / "log").read_text()
