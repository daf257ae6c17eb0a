"""Sources with weights: what a run uses, how it resumes, and the means of its validations."""

from pathlib import Path

import numpy as np
import pytest

from dpo_api.errors import IncompatibleCheckpointError
from dpo_testing.corpora import write_jsonl
from dpo_testing.runs import merged, run_here
from dpo_testing.training_world import make, preferences
from dpo_trainer.run import Run

pytestmark = pytest.mark.slow


def test_a_run_uses_its_sources_by_their_weights_and_resumes_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    spec = make(tmp_path, pairs=6)
    write_jsonl(tmp_path / "more.jsonl", preferences(12, seed=3))
    write_jsonl(tmp_path / "other.jsonl", preferences(4, seed=4))
    few, many = {"uri": str(tmp_path / "train.jsonl"), "weight": 4}, {"uri": str(tmp_path / "more.jsonl")}
    held_out = [
        {"name": "a", "uri": str(tmp_path / "valid.jsonl"), "weight": 3},
        {"name": "b", "uri": str(tmp_path / "other.jsonl")},
    ]
    data = {"train": [few, many], "validation": held_out}
    training = {"maxSteps": 8, "globalBatchSize": 4, "validationInterval": 4}
    training["schedule"] = {"minLearningRate": 2e-3}  # no step's rate depends on the number of steps
    spec = merged(spec, {"data": data, "training": training})
    epochs: list[list[int]] = []

    def look(run: Run) -> None:
        inputs = run.training.inputs
        epochs.extend(np.concatenate(inputs.epoch(number)).tolist() for number in range(2))
        assert sorted(set(epochs[0] + epochs[1][:12])) == inputs.training_pairs().tolist()

    whole = run_here(spec, tmp_path / "whole", look)
    # 18 uses an epoch: 24/36 of them of the 6 pairs, so each twice, and 6 of the 12.
    assert [sum(pair < 6 for pair in epoch) for epoch in epochs] == [12, 12]
    assert sorted(pair for epoch in epochs for pair in epoch if pair >= 6) == list(range(6, 18))
    assert whole.series("train/consumed_samples")[-1] == 18 + 3 * 4

    half = merged(spec, {"training": {"maxSteps": 4}})
    run_here(half, tmp_path / "parts")
    resumed = run_here(spec, tmp_path / "parts")
    assert resumed.series("train/loss")[4:] == whole.series("train/loss")[4:]

    evenly = merged(spec, {"data": {"train": [{**few, "weight": 1}, many]}})
    with pytest.raises(IncompatibleCheckpointError, match=r"spec.data.train was .*12 of 6, 6 of 12 pairs"):
        run_here(merged(evenly, {"training": {"maxSteps": 9}}), tmp_path / "parts")

    last = whole.events[-1]
    for key in ("loss", "acc", "rewards_margin"):
        expected = (3 * 5 * last[f"val/a/{key}"] + 4 * last[f"val/b/{key}"]) / (3 * 5 + 4)
        assert last[f"val/{key}"] == pytest.approx(expected, rel=1e-9)
