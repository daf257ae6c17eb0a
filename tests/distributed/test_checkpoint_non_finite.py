"""A loss or gradient that is not finite ends the run on all ranks before it can change a weight or a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_api.errors import NonFiniteError, Outcome
from dpo_testing.corpora import write_jsonl
from dpo_testing.runs import Finished, finish, job_of, merged, start
from dpo_testing.training_world import make
from dpo_testing.trajectories import checkpoints_in
from dpo_trainer import batches
from dpo_trainer.distributed import World
from dpo_trainer.run import Run, RunOptions
from dpo_trainer.stopping import StopRequest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("checkpoint-non-finite")]

EXTREME = 9
"""A pair that is not among the first batch's eight."""


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    change = {"training": {"maxSteps": 6}, "checkpoint": {"everySteps": 1}, "dpo": {"loss": "rpo_sq"}}
    return merged(make(world, pairs=13), change)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_infinite_reward_moves_no_weight(
    precision: str, spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward becomes infinite at the third step: step 2 is the last that counts."""
    rewards = batches.DataSet.rewards
    job = job_of(merged(spec, {"training": {"precision": precision}}))
    world = World.join()
    try:
        run = Run(job, world, StopRequest(), RunOptions(run_dir=str(tmp_path / "run")))
        weights: list[dict[str, torch.Tensor]] = []

        def planted(data: batches.DataSet, pairs: torch.Tensor) -> torch.Tensor:
            found = rewards(data, pairs)
            training = run.training
            if training is not None and training.step == 2 and data.name == "train":
                weights.append(
                    {name: value.detach().clone() for name, value in training.engine.model.named_parameters()}
                )
                found[0, 0] = float("inf")
            return found

        monkeypatch.setattr(batches.DataSet, "rewards", planted)
        with pytest.raises(NonFiniteError, match="this step has not changed the weights") as raised:
            run.execute()
        assert raised.value.outcome.exit_code == 5
        assert run.training is not None
        now = dict(run.training.engine.model.named_parameters())
        assert [name for name, value in weights[-1].items() if not now[name].equal(value)] == []
    finally:
        world.leave()
    assert checkpoints_in(tmp_path / "run") == [1, 2]
    assert Finished(tmp_path / "run").steps == [1, 2]


def test_an_extreme_reward_in_the_data_stops_every_process(spec: dict[str, Any], world: Path) -> None:
    """Its square is beyond every float: one line of the data, which the first epoch's second batch holds."""
    rows = [json.loads(line) for line in Path(spec["data"]["train"][0]["uri"]).read_text().splitlines()]
    rows[EXTREME]["chosen_reward"] = 1e300
    write_jsonl(world / "extreme.jsonl", rows)
    scratch = world / "scratch"
    extreme = merged(spec, {"data": {"train": [{"uri": str(world / "extreme.jsonl")}]}})
    child = start(extreme, world / "run", processes=2, scratch=scratch)
    words = finish(child, scratch, code=Outcome.NonFinite.exit_code)
    assert words["outcome"] == "NonFinite"
    assert "extreme rewards" in words["message"]
    assert "Traceback" not in (scratch / "log").read_text()
    assert (Finished(world / "run").steps, checkpoints_in(world / "run")) == ([1], [1])
    for line in (world / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
