"""A layout that was chosen for GPUs: it is recorded, the run uses its sizes, and so does the next attempt."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_api.errors import InvalidSpecError
from dpo_api.sizing import Hardware, Product, memory_of
from dpo_testing.adapters import write_adapter
from dpo_testing.runs import job_of, merged, run_here
from dpo_testing.sizes import gpus
from dpo_testing.training_world import make
from dpo_trainer import reporting
from dpo_trainer.distributed import World
from dpo_trainer.layouts import Decision, agreed
from dpo_trainer.run import Run, RunOptions, directory_of
from dpo_trainer.stopping import StopRequest
from dpo_trainer.training import Training

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chosen-layout")]

ONE = gpus("H200", per_node=1)


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    changes = {"training": {"maxSteps": 2, "packing": None}, "checkpoint": {"everySteps": 2}}
    return merged(make(world, pairs=13), changes)


def attempt(spec: dict[str, Any], folder: Path, hardware: Hardware | None = ONE) -> tuple[Decision, Run]:
    """Run in this process as a worker does on a machine with these GPUs; only the choice knows of them."""
    job, options = job_of(spec), RunOptions(run_dir=str(folder))
    world = World.connect()
    try:
        decision = agreed(job.spec, world, directory_of(job, options), hardware)
        world.divide(tensor=decision.layout.tensor, pipeline=decision.layout.pipeline)
        run = Run(job, world, StopRequest(), options, decision)
        run.execute()
    finally:
        world.leave()
    return decision, run


def test_a_choice_is_recorded_and_used_again(
    spec: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(reporting, "peak_memory", lambda: 1 << 20)
        first, run = attempt(spec, tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    memory = {(s["train/memory_peak"], s["train/memory_predicted"]) for s in steps if "train/loss" in s}
    assert memory == {(1 << 20, first.predicted_memory)}
    assert "train/memory_peak" not in run.reporter.latest, "it is not the same on every rank"
    assert "layout: tensor 1, pipeline 1, data 1, no recomputation, packs of " in capfd.readouterr().out
    record = json.loads((tmp_path / "layout.json").read_text())
    assert record["layout"]["pack_tokens"] == first.layout.pack_tokens
    assert run.spec.training.packing.max_tokens == first.layout.pack_tokens
    # The author's spec is what is compared between attempts, and what the report shows.
    assert "packing" not in json.loads((tmp_path / "spec.json").read_text())["spec"]["training"]

    (tmp_path / "export.json").unlink()
    record["layout"]["pack_tokens"] = 2 * spec["data"]["maxLength"]
    (tmp_path / "layout.json").write_text(json.dumps(record))
    longer = merged(spec, {"training": {"maxSteps": 4}})
    second, run = attempt(longer, tmp_path)
    assert "layout of an earlier attempt: " in capfd.readouterr().out
    assert second.layout.pack_tokens == run.spec.training.packing.max_tokens == 2 * spec["data"]["maxLength"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == 4


def test_a_continued_adapter_counts_with_its_own_rank(spec: dict[str, Any], tmp_path: Path) -> None:
    """The choice reads the adapter before the run does; the spec that is kept says nothing of its rank."""
    sft = write_adapter(Path(spec["model"]["huggingFace"]["uri"]), tmp_path / "sft", r=2)
    continued = merged(spec, {"lora": {"continueAdapter": True}, "model": {"adapter": {"uri": str(sft)}}})
    found, run = attempt(continued, tmp_path / "run")
    lora = run.spec.lora
    assert lora is not None
    assert (lora.rank, lora.modules) == (2, ("attention_qkv", "mlp_fc2"))

    def predicted(rank: int) -> int:
        sized = run.spec.model_copy(update={"lora": lora.model_copy(update={"rank": rank})})
        return memory_of(run.config.facts, sized, found.layout).total

    assert found.predicted_memory == predicted(2) < predicted(32)
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["spec"]["lora"] == {"continueAdapter": True}


def test_a_record_that_is_not_json_is_made_again(spec: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text("{")
    attempt(spec, tmp_path)
    assert json.loads((tmp_path / "layout.json").read_text())["madeFor"]["gpus"] == 1


def test_nothing_is_recorded_on_cpu(spec: dict[str, Any], tmp_path: Path) -> None:
    decision, run = attempt(spec, tmp_path, None)
    assert decision.layout.short == "T1 P1 D1"
    assert run.spec == run.job.spec
    assert not (tmp_path / "layout.json").exists()
    assert run_here(spec, tmp_path).folder == tmp_path, "the finished run is recognised"


def test_what_does_not_fit_is_refused_before_the_model_is_read(spec: dict[str, Any], tmp_path: Path) -> None:
    weights = Path(spec["model"]["huggingFace"]["uri"]) / "model.safetensors"
    assert weights.is_file()
    small = Hardware(1, 1, Product("small", 1 << 20, 1, 1, 1, ()))
    with pytest.raises(InvalidSpecError, match=r"^spec\.resources: the model does not fit 1 node of 1 small: "):
        attempt(spec, tmp_path / "run", small)
    assert not (tmp_path / "run").exists(), "the run directory is not claimed"


def test_out_of_memory_takes_the_runner_up_once(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What CUDA raises is planted; what the worker and the next attempt make of it is real."""
    said: list[str | None] = []

    def full(training: Training) -> None:
        del training
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fails() -> Decision:
        job, options = job_of(spec), RunOptions(run_dir=str(tmp_path))
        world = World.connect()
        try:
            decision = agreed(job.spec, world, directory_of(job, options), ONE)
            world.divide()
            run = Run(job, world, StopRequest(), options, decision)
            assert run.take_runner_up() is None, "the directory is not its own yet"
            with monkeypatch.context() as planted:
                planted.setattr(Training, "run", full)
                with pytest.raises(torch.OutOfMemoryError):
                    run.execute()
            said.append(run.take_runner_up())
        finally:
            world.leave()
        return decision

    first = fails()
    assert first.record is not None
    runner_up = first.record["runnersUp"][0]
    record = json.loads((tmp_path / "layout.json").read_text())
    assert (record["layout"], record["ranOutOfMemory"]) == (runner_up, asdict(first.layout))
    assert "memory" not in record, "it was that of the other layout"
    assert said[0] is not None
    assert said[0].startswith("the layout that was chosen ran out of memory; the next attempt uses tensor 1, ")

    second = fails()
    assert asdict(second.layout) == runner_up
    assert "layout of an earlier attempt, since another one ran out of memory: " in capfd.readouterr().out
    assert said[1] is None, "a second time it is an error"
    assert json.loads((tmp_path / "layout.json").read_text()) == record

    third, _ = attempt(spec, tmp_path)
    assert third.layout == second.layout
