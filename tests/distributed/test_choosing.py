"""Runs that keep their best checkpoint, export it, and end early."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load

from dpo_api.errors import Outcome, StoppedError
from dpo_store import open_store
from dpo_testing import runs
from dpo_testing.command import Command
from dpo_testing.corpora import write_jsonl
from dpo_testing.preloaded import STEP_SECONDS
from dpo_testing.runs import Finished, kill, merged, run_here, run_processes, start, wait_for_step
from dpo_testing.training_world import LORA, make, preferences
from dpo_testing.trajectories import checkpoints_in, differences
from dpo_trainer import training
from dpo_trainer.checkpoint import store
from dpo_trainer.engine import Engine
from dpo_trainer.run import Run
from dpo_trainer.rundir import RunDirectory, SavedCheckpoint
from dpo_trainer.stopping import StopRequest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("choosing")]

BEST = 2
"""Random preferences of others are not learned: at this rate the loss on them rises from the second validation on."""
CHOOSING: dict[str, Any] = {
    "training": {"maxSteps": 30, "learningRate": 1e-2, "validationInterval": 2, "earlyStopping": {"patience": 6}},
    "checkpoint": {"everySteps": 5, "keep": 1, "monitor": "val/loss"},
    "output": {"from": "best"},
}
ENDS = BEST + 2 * 6
NAMES = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
}


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    return merged(make(world), CHOOSING)


@pytest.fixture(scope="module")
def undisturbed(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(spec, world / "undisturbed")


def ended(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "export.json").read_text())
    return {name: found[name] for name in ("step", "total", "model_step", "best", "stopped_early")}


def saved(folder: Path, step: int, names: dict[str, str]) -> dict[str, Tensor]:
    """Masters of a checkpoint, read by torch alone, by the names of the export."""
    reader = FileSystemReader(folder / "checkpoints" / f"step-{step:06d}")
    sizes = {key: entry.size for key, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    tensors = {name: torch.full(sizes[f"master.{key}"], torch.nan) for name, key in names.items()}
    load({f"master.{key}": tensors[name] for name, key in names.items()}, storage_reader=reader, no_dist=True)
    return tensors


def the_export_is_the_checkpoint(run: Finished, step: int) -> None:
    for name, tensor in saved(run.folder, step, NAMES).items():
        assert torch.equal(run.weights[name], tensor), name


def test_the_best_is_kept_and_exported_and_the_run_ends_early(undisturbed: Finished) -> None:
    losses = {event["step"]: event["val/loss"] for event in undisturbed.events if "val/loss" in event}
    assert min((step for step in losses if step), key=losses.__getitem__) == BEST
    assert checkpoints_in(undisturbed.folder) == [BEST, ENDS]
    assert undisturbed.steps == list(range(1, ENDS + 1))
    assert ended(undisturbed.folder) == {
        "step": ENDS,
        "total": 30,
        "model_step": BEST,
        "best": {"metric": "val/loss", "step": BEST, "value": losses[BEST]},
        "stopped_early": f"val/loss has not improved in 6 validations since step 2, where it was {losses[BEST]:.3f}",
    }
    the_export_is_the_checkpoint(undisturbed, BEST)
    card = ModelCard.load(undisturbed.folder / "model" / "README.md")
    assert f"| val/loss | {losses[BEST]:.6g} |" in card.text, "the metrics are those of the weights"
    assert f"{ENDS} steps of at most 8 pairs. The weights are those of step {BEST}." in card.text
    last = saved(undisturbed.folder, ENDS, NAMES)
    assert not torch.equal(undisturbed.weights["lm_head.weight"], last["lm_head.weight"])


def test_the_last_step_is_exported_where_the_best_is_not_asked_for(
    spec: dict[str, Any], undisturbed: Finished, world: Path
) -> None:
    run = run_here(merged(spec, {"output": None}), world / "last")
    assert ended(run.folder) == ended(undisturbed.folder) | {"model_step": ENDS}
    the_export_is_the_checkpoint(run, ENDS)


def test_killed_and_resumed_with_the_best_and_the_patience_so_far(
    spec: dict[str, Any], undisturbed: Finished, world: Path
) -> None:
    """The checkpoint of step 5 knows of one validation without an improvement, and of the best one at step 2."""
    folder = world / "killed"
    child = start(spec, folder, processes=1, scratch=world / "kill scratch", environment={STEP_SECONDS: "0.2"})
    wait_for_step(folder, 7)
    kill(child)
    assert checkpoints_in(folder) == [BEST, 5]
    resumed = run_here(spec, folder)
    assert differences(undisturbed, resumed) == []
    assert ended(folder) == ended(undisturbed.folder)


def test_tensor_parallel_in_the_background_is_the_same(
    spec: dict[str, Any], undisturbed: Finished, world: Path
) -> None:
    changes = {"parallelism": {"tensor": 2}, "checkpoint": {"async": True}, "resources": {"processesPerNode": 2}}
    run = run_processes(merged(spec, changes), world / "tensor", processes=2, scratch=world / "tensor scratch")
    assert differences(undisturbed, run) == []
    assert checkpoints_in(run.folder) == [BEST, ENDS]
    mine, other = ended(run.folder), ended(undisturbed.folder)
    assert mine.pop("best") == pytest.approx(other.pop("best"), rel=1e-5)
    assert mine == other
    the_export_is_the_checkpoint(run, BEST)


def test_a_run_that_ended_early_is_finished(spec: dict[str, Any], undisturbed: Finished) -> None:
    """And exports again without a step where only its model was deleted."""
    before, results = ended(undisturbed.folder), []

    def keep(run: Run) -> None:
        results.append(run.result(0, Outcome.Succeeded, ""))

    run_here(spec, undisturbed.folder, keep)
    for file in (undisturbed.folder / "model").glob("*.safetensors"):
        file.unlink()
    again = run_here(spec, undisturbed.folder, keep)
    assert again.steps == list(range(1, ENDS + 1))
    assert ended(again.folder) == before
    the_export_is_the_checkpoint(again, BEST)
    found, exported = results
    assert (found.already_complete, exported.already_complete) == (True, False)
    for result in results:
        assert {name: getattr(result, name) for name in before} == before


def test_an_adapter_is_exported_from_the_best_checkpoint(spec: dict[str, Any], world: Path) -> None:
    """Merged and alone: both are of the same step, and not of the last one."""
    changes = merged(LORA, {"training": {"learningRate": 3e-2, "maxSteps": 8, "earlyStopping": None}})
    best = run_here(merged(spec, changes), world / "adapter of the best")
    last = run_here(merged(merged(spec, changes), {"output": None}), world / "adapter of the last")
    assert ended(best.folder)["model_step"] < ended(last.folder)["model_step"] == 8
    assert differences(best, last)[0].endswith("away")
    adapters = [load_file(run.folder / "model/adapter/adapter_model.safetensors") for run in (best, last)]
    key = "decoder.layers.self_attention.linear_proj.adapter.linear_out.weight"
    layers = saved(best.folder, ended(best.folder)["model_step"], {"B": key})["B"]
    for layer, matrix in enumerate(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_B.weight"
        assert torch.equal(adapters[0][name], matrix)
        assert not torch.equal(adapters[1][name], matrix)


def test_no_checkpoint_goes_before_its_successor_is_there(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save of the new best fails: the best before it is still there, though another checkpoint followed it."""
    folder = world / "successor"
    spec = merged(make(folder), CHOOSING)
    write_jsonl(folder / "valid.jsonl", preferences(21, seed=1))  # the training data: each validation is the best
    changes = {"checkpoint": {"async": True, "everySteps": 1}, "training": {"learningRate": 2e-3}}
    write = store.write

    def failing(run: Any, rank: int, step: int, *more: Any) -> Any:
        if step == 4:
            raise OSError("the disk is gone")
        return write(run, rank, step, *more)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            run_here(merged(spec, changes), folder / "run")
    assert checkpoints_in(folder / "run") == [2, 3]
    assert store.read_marker(_directory(folder / "run"), SavedCheckpoint(3, "")).choice["best"]["step"] == 2


def test_a_validation_that_is_made_up_for_counts(
    spec: dict[str, Any], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the validation after step 2, which is the best: the resumed run makes up for it and saves that."""
    folder, stop = world / "made up", StopRequest()
    more = merged(spec, {"training": {"globalBatchSize": 4}})
    whole = run_here(more, world / "whole")
    evaluate, calls = Engine.evaluate, 0

    def counted(self: Engine, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        stop.signalled = calls == 3  # the first of the two batches after step 2
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "evaluate", counted)
        patch.setattr(runs, "StopRequest", lambda: stop)
        with pytest.raises(StoppedError, match="after step 2 of"):
            run_here(more, folder)
    assert store.read_marker(_directory(folder), SavedCheckpoint(2, "")).validated is False
    resumed = run_here(more, folder)
    assert differences(whole, resumed) == []
    assert ended(folder) == ended(whole.folder)
    assert ended(folder)["model_step"] == BEST
    the_export_is_the_checkpoint(resumed, BEST)


def test_without_a_finite_value_the_last_step_is_exported(
    spec: dict[str, Any], world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "means", lambda _: {"loss": math.nan})
    run = run_here(merged(spec, {"training": {"earlyStopping": {"patience": 2}}}), world / "nan")
    found = ended(run.folder)
    assert (found["step"], found["model_step"], found["best"]) == (4, 4, None)
    assert found["stopped_early"] == "val/loss was not finite in 2 validations"
    assert "warning: no validation had a finite val/loss: exporting the last step" in capsys.readouterr().out


def _directory(folder: Path) -> RunDirectory:
    return RunDirectory(open_store(), str(folder))


def test_the_command_says_why_and_which(spec: dict[str, Any], world: Path) -> None:
    dpo = Command(world)
    said = dpo("run", "-f", dpo.write(spec), "-o", "said")
    assert said.code == 0, said.all
    why = ended(world / "said")["stopped_early"]
    summary = json.loads((world / "said" / "summary.json").read_text())
    assert (summary["outcome"], summary["step"], summary["total"]) == ("Succeeded", ENDS, 30)
    assert (summary["stoppedEarly"], summary["modelStep"], summary["best"]["step"]) == (why, BEST, BEST)
    value = summary["best"]["value"]
    assert f"stopped     early, after step {ENDS} of 30: {why}" in said.out
    assert f"best        val/loss {value:.3f} at step {BEST}" in said.out
    assert f"model       said/model (of step {BEST})" in said.out
    page = (world / "said" / "report.html").read_text()
    assert why in page
    assert f"at step {BEST}, exported" in page
