"""Every family's DPO run over several processes is the run of one process."""

from pathlib import Path

import pytest

from dpo_testing.families import unlike_adapters, unlike_trajectories
from dpo_testing.models import VARIANTS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("families")]

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
    assert unlike_trajectories(variant, layout, tmp_path) == []


@pytest.mark.nightly
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_adapters_of_two_processes_are_those_of_one(variant: str, tmp_path: Path) -> None:
    assert unlike_adapters(variant, tmp_path) == []
