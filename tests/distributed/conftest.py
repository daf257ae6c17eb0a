"""What the modules of whole runs share."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dpo_testing.runs import Finished

STEPS, EVERY = 24, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A module's folder: its model, its data, its runs."""
    return tmp_path_factory.mktemp(request.path.stem.removeprefix("test_"))


@pytest.fixture(scope="session")
def slow_spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """24 steps of eight packs, so that a step takes long enough for a signal to find the run under way.

    A checkpoint every eight steps. Modules that use it belong to the xdist group "interruption": then it is made, and
    its undisturbed run trained, once.
    """
    from dpo_testing.training_world import make, merged

    slow = {"maxSteps": STEPS, "learningRate": 1e-3, "validationInterval": 6, "packing": {"enabled": False}}
    folder = tmp_path_factory.mktemp("slow")
    return merged(make(folder, pairs=21), {"training": slow, "checkpoint": {"everySteps": EVERY}})


@pytest.fixture(scope="session")
def undisturbed(slow_spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """The run that every interrupted and resumed run must equal."""
    from dpo_testing.runs import run_here

    return run_here(slow_spec, tmp_path_factory.mktemp("undisturbed") / "run")
