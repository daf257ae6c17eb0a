"""A stop does not wait for a long validation: the step is saved, and its validation runs after the resume."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dpo_api.errors import InvalidSpecError, StoppedError
from dpo_testing import runs
from dpo_testing.runs import merged, run_here
from dpo_testing.training_world import make
from dpo_testing.trajectories import differences
from dpo_trainer.engine import Engine
from dpo_trainer.stopping import StopRequest

pytestmark = [pytest.mark.slow]


def test_a_stop_during_validation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 20 validation pairs in batches of 8: three batches a validation, at the start and after steps 3 and 6.
    spec = merged(make(tmp_path, pairs=17, validation=20), {"training": {"maxSteps": 6}})
    undisturbed = run_here(spec, tmp_path / "undisturbed")

    stop = StopRequest()
    evaluate, calls = Engine.evaluate, 0

    def counted(self: Engine, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        stop.signalled = calls == 8  # the second of the three batches after step 6, the last step
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "evaluate", counted)
        patch.setattr(runs, "StopRequest", lambda: stop)
        with pytest.raises(StoppedError, match="after step 6 of 6"):
            run_here(spec, tmp_path / "stopped")
    assert calls == 8
    assert not (tmp_path / "stopped" / "export.json").exists()

    resumed = run_here(spec, tmp_path / "stopped")
    assert differences(undisturbed, resumed) == []
    assert [event["step"] for event in resumed.events if "val/loss" in event] == [0, 3, 6]


def test_a_length_beyond_the_model_is_refused_by_the_trainer_too(tmp_path: Path) -> None:
    spec = merged(make(tmp_path), {"data": {"maxLength": 4096}, "training": {"packing": None}})
    with pytest.raises(InvalidSpecError, match=r"spec.data.maxLength: 4096 .* 256"):
        run_here(spec, tmp_path / "run")
