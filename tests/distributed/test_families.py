"""Every family's DPO run over several processes is the run of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_testing.models import VARIANTS
from dpo_testing.runs import merged, run_here, run_processes
from dpo_testing.training_world import LORA, make
from dpo_testing.trajectories import differences

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("families")]

STEADY = {"maxSteps": 5, "learningRate": 5e-4, "validationInterval": 4, "eps": 1e-6}
SPLIT: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2, sequence": (2, {"tensor": 2, "sequence": True}),
    "TP4 of 2 groups": (4, {"tensor": 4}),
    "CP2": (2, {"context": 2}),
    "TP2 PP2, sequence": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
}
CASES = [
    *[(variant, layout) for variant in VARIANTS for layout in ("TP2", "TP2, sequence")],
    ("olmo2", "TP4 of 2 groups"),
    *[(variant, "CP2") for variant in ("gemma3", "smollm3", "nemotron")],
    *[(variant, "TP2 PP2, sequence") for variant in ("gemma3", "smollm3", "granite", "olmo2")],
]
CHOSEN = [("gemma3", "TP2, sequence"), ("olmo2", "TP4 of 2 groups")]
"""In `make test`: those with the most parts of their own. The others are nightly."""


@pytest.mark.parametrize(
    ("variant", "layout"),
    [pytest.param(*case, marks=[] if case in CHOSEN else [pytest.mark.nightly]) for case in CASES],
)
def test_several_processes_are_one_trajectory(variant: str, layout: str, tmp_path: Path) -> None:
    processes, parallelism = SPLIT[layout]
    spec = merged(make(tmp_path, pairs=11, variant=variant), {"training": STEADY})
    alone = run_here(spec, tmp_path / "alone")
    losses = alone.series("train/preference_loss")
    assert losses[-1] < losses[0] - 0.1
    # A reference of its own: computed in this layout, not read from the other run's cache.
    changed = merged(spec, {"parallelism": parallelism, "reference": {"cacheURI": str(tmp_path / "its reference")}})
    split = run_processes(changed, tmp_path / "split", processes=processes, scratch=tmp_path / "scratch")
    assert differences(alone, split) == []
    assert "layout verified: " in (tmp_path / "scratch" / "log").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_adapters_of_two_processes_are_those_of_one(variant: str, tmp_path: Path) -> None:
    spec = merged(make(tmp_path, pairs=11, variant=variant), {"training": STEADY})
    spec = merged(spec, {"lora": LORA["lora"], "training": {"learningRate": 2e-3}})
    alone = run_here(spec, tmp_path / "alone")
    changed = merged(spec, {"parallelism": {"tensor": 2}, "reference": {"cacheURI": str(tmp_path / "its reference")}})
    split = run_processes(changed, tmp_path / "split", processes=2, scratch=tmp_path / "scratch")
    assert differences(alone, split) == []
    one, two = (load_file(run.folder / "model" / "adapter" / "adapter_model.safetensors") for run in (alone, split))
    assert one.keys() == two.keys()
    for name, matrix in one.items():
        assert matrix.abs().max() > 0, name
        torch.testing.assert_close(two[name], matrix, rtol=0, atol=1e-5, msg=name)
