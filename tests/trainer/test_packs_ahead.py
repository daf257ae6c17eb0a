"""The packs of a step are made while the step before it runs."""

import threading
from pathlib import Path
from typing import Any

import pytest

from dpo_testing.runs import merged, run_here
from dpo_testing.training_world import make
from dpo_trainer.batches import Packer
from dpo_trainer.engine import Engine
from dpo_trainer.model.pack import Pack

pytestmark = pytest.mark.slow


def spec_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Four steps in two epochs."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    training = {"epochs": 2, "globalBatchSize": 4, "maxSteps": None, "validationInterval": None}
    return merged(make(tmp_path, pairs=8), {"training": training})


def test_a_steps_packs_are_there_before_the_step_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, packs = Engine.train_step, Packer.packs
    made = threading.Semaphore(0)
    used: list[list[int]] = []

    def noted(self: Packer, *of: Any) -> tuple[list[Pack], int]:
        result = packs(self, *of)
        if threading.current_thread() is not threading.main_thread():
            made.release()
        return result

    def waiting(self: Engine, pairs: Any, own: list[Pack], *of: Any, **more: Any) -> Any:
        used.append(sorted(pair for pack in own for pair in pack.pairs.tolist()))
        assert used[-1] == sorted(pairs.tolist())
        if len(used) < 4:
            assert made.acquire(timeout=60), f"the packs after step {len(used)} were not started"
        return step(self, pairs, own, *of, **more)

    monkeypatch.setattr(Packer, "packs", noted)
    monkeypatch.setattr(Engine, "train_step", waiting)
    finished = run_here(spec_of(tmp_path, monkeypatch), tmp_path / "out")
    assert finished.steps == [1, 2, 3, 4]
    assert not made.acquire(blocking=False)  # nothing was started after the last step
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dpo-packs")]


def test_an_error_while_they_are_made_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = Packer.packs

    def failing(self: Packer, *of: Any) -> tuple[list[Pack], int]:
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the index cannot be read")
        return packs(self, *of)

    monkeypatch.setattr(Packer, "packs", failing)
    with pytest.raises(OSError, match="the index cannot be read"):
        run_here(spec_of(tmp_path, monkeypatch), tmp_path / "out")
