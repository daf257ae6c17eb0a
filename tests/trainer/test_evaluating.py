"""What a validation measures: the model as it would be exported now."""

from pathlib import Path
from typing import Any

import pytest

from dpo_testing.runs import merged, run_here
from dpo_testing.training_world import make
from dpo_trainer.metrics.sums import means
from dpo_trainer.run import Run

pytestmark = pytest.mark.slow


def test_a_validation_draws_no_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    lora = {"rank": 4, "dropout": 0.5, "targetModules": ["all"]}
    training = {"maxSteps": 3, "learningRate": 1e-2, "validationInterval": 1}
    spec = merged(make(tmp_path, pairs=8), {"lora": lora, "training": training})
    found: list[float] = []

    def again(run: Run) -> None:
        training: Any = run.training
        for data, batches in training.inputs.validation_batches():
            packs, _ = training.inputs.packer.packs(data, batches[0], training.world)
            found.append(means(training.engine.evaluate(batches[0], packs, data.reference_sums, data.rewards))["loss"])
        assert all(module.training for module in training.engine.model.modules())  # steps go on drawing it

    def twice(run: Run) -> None:
        again(run)
        again(run)

    recorded = run_here(spec, tmp_path / "out", twice).series("val/loss")
    assert abs(recorded[-1] - recorded[0]) > 1e-3  # the adapters do something
    assert found == [recorded[-1]] * 2
