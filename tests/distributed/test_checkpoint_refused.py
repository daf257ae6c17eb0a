"""Which checkpoints can be resumed: damaged, foreign and half-written ones are refused or skipped, and run no code."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

from dpo_api.errors import IncompatibleCheckpointError, Outcome
from dpo_testing.corpora import write_jsonl
from dpo_testing.runs import Finished, merged, run_here
from dpo_testing.training_world import make, preferences
from dpo_testing.trajectories import checkpoints_in, differences
from dpo_trainer import run as run_module
from dpo_trainer.results import summarise
from dpo_trainer.run import Run
from dpo_trainer.rundir import MARKER

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("checkpoint-refused")]

STEPS = 4
HARMED = "master.embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    return merged(make(world, pairs=13), {"training": {"maxSteps": STEPS}, "checkpoint": {"everySteps": 2}})


@pytest.fixture(scope="module")
def finished(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(spec, world / "finished")


@pytest.fixture
def unfinished(finished: Finished, tmp_path: Path) -> Path:
    """The run directory as it was before the export."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "export.json").unlink()
    shutil.rmtree(folder / "model")
    return folder


def step_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def refused(spec: dict[str, Any], folder: Path) -> str:
    """The refusal of a run, which must leave the directory's checkpoints and record as they were."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "attempt"}
    with pytest.raises(IncompatibleCheckpointError) as raised:
        run_here(spec, folder)
    assert raised.value.outcome is Outcome.IncompatibleCheckpoint
    assert {path: path.read_bytes() for path in before} == before
    return str(raised.value)


# -- half-written and superfluous ones


def test_a_half_written_checkpoint_is_passed_over(
    finished: Finished, unfinished: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (step_folder(unfinished, 4) / MARKER).unlink()
    (step_folder(unfinished, 4) / ".metadata").write_bytes(b"half")
    step_folder(unfinished, 3).mkdir()
    (step_folder(unfinished, 3) / "__0_0.distcp").write_bytes(b"half")
    resumed = run_here(spec, unfinished)
    assert "resuming from step 2" in capsys.readouterr().out
    assert differences(finished, resumed) == []
    assert not step_folder(unfinished, 3).exists()  # a later complete checkpoint clears it away


def test_keep_leaves_the_newest(spec: dict[str, Any], tmp_path: Path) -> None:
    run_here(merged(spec, {"checkpoint": {"everySteps": 1, "keep": 2}}), tmp_path / "run")
    assert checkpoints_in(tmp_path / "run") == [3, 4]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


# -- finished runs


def test_a_finished_run_has_nothing_to_do(
    finished: Finished, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*") if path.is_file()}
    before.pop(finished.folder / "attempt")
    capsys.readouterr()
    results: list[Any] = []
    run_here(spec, finished.folder, lambda run: results.append(run.result(0, Outcome.Succeeded, "")))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "nothing to do" in capsys.readouterr().out
    (result,) = results
    assert (result.step, result.total, result.attempt) == (STEPS, STEPS, 2)
    assert result.already_complete
    assert summarise(results, 0, asked=False).already_complete
    assert result.model_uri == str(finished.folder / "model")
    assert result.metrics["train/loss"] == finished.series("train/loss")[-1]


def test_a_finished_run_can_be_made_longer(
    finished: Finished, spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    longer = merged(spec, {"training": {"maxSteps": STEPS + 2}})

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "export_model", fail)
        with pytest.raises(OSError, match="gone"):
            run_here(longer, folder)
    # export.json was written by the shorter run: it must not describe a half-written model of the longer one.
    assert not (folder / "export.json").exists()
    assert run_here(longer, folder).steps == list(range(1, STEPS + 3))
    assert json.loads((folder / "export.json").read_text())["step"] == STEPS + 2


def test_a_run_made_shorter_than_its_checkpoint_is_refused(unfinished: Path, spec: dict[str, Any]) -> None:
    message = refused(merged(spec, {"training": {"maxSteps": 2}}), unfinished)
    assert "step 4" in message
    assert "last step 2" in message


def test_resume_false_refuses_a_checkpoint(unfinished: Path, spec: dict[str, Any]) -> None:
    message = refused(merged(spec, {"checkpoint": {"resume": False}}), unfinished)
    assert "spec.checkpoint.resume is false" in message
    assert "step 4" in message


# -- another run's checkpoint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dpo": {"beta": 0.2}}, "dpo.beta was 0.1, now 0.2"),
        ({"dpo": {"loss": "ipo"}}, "dpo.loss was dpo, now ipo"),
        ({"dpo": {"sftWeight": 0.5}}, "dpo.sftWeight was 0.0, now 0.5"),
        ({"lora": {"rank": 4}}, "lora was absent, now given"),
        ({"training": {"seed": 7}}, "training.seed was 1234, now 7"),
        ({"training": {"globalBatchSize": 4}}, "training.globalBatchSize was 8, now 4"),
        ({"training": {"learningRate": 1e-3}}, "training.learningRate was 0.002, now 0.001"),
        ({"training": {"schedule": {"warmupSteps": 1}}}, "training.schedule.warmupSteps was 0, now 1"),
        ({"training": {"betas": [0.9, 0.999]}}, "training.betas was (0.9, 0.98), now (0.9, 0.999)"),
        ({"training": {"precision": "bf16"}}, "training.precision was fp32, now bf16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.split()[0],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(
    change: dict[str, Any], said: str, unfinished: Path, spec: dict[str, Any]
) -> None:
    assert said in refused(merged(spec, change), unfinished)


def test_a_checkpoint_of_another_model_is_refused(
    unfinished: Path, spec: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    was = json.loads((step_folder(unfinished, 4) / MARKER).read_text())["identity"]["model"]
    message = refused(merged(spec, {"model": {"huggingFace": {"uri": str(tmp_path / "model")}}}), unfinished)
    assert f"model was {was[:12]}, now " in message


def test_a_checkpoint_of_other_data_is_refused(unfinished: Path, spec: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "other.jsonl", preferences(13, seed=9))
    message = refused(merged(spec, {"data": {"train": [{"uri": str(tmp_path / "other.jsonl")}]}}), unfinished)
    assert "data.train was " in message


# -- damage and malice


class _Harm:
    """An unsafe unpickle of it would run a shell command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch '{self.proof}'",)


def random_bytes(checkpoint: Path, _proof: Path) -> None:
    (checkpoint / ".metadata").write_bytes(bytes(range(256)) * 20)


def gone(checkpoint: Path, _proof: Path) -> None:
    (checkpoint / ".metadata").unlink()


def harmful_metadata(checkpoint: Path, proof: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Harm(proof)))


def harmful_object(checkpoint: Path, proof: Path) -> None:
    """Metadata in good order that points at a pickled object in the place of a tensor."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    index = next(index for index in metadata.storage_data if index.fqn == HARMED)
    info = metadata.storage_data[index]
    crafted = io.BytesIO()
    torch.save(_Harm(proof), crafted)
    data = checkpoint / info.relative_path
    offset = data.stat().st_size
    with data.open("ab") as file:
        file.write(crafted.getvalue())
    place = _StorageInfo(info.relative_path, offset, len(crafted.getvalue()))
    storage = {**metadata.storage_data, MetadataIndex(HARMED): place}
    objects = {**metadata.state_dict_metadata, HARMED: BytesStorageMetadata()}
    crafted_metadata = replace(metadata, storage_data=storage, state_dict_metadata=objects)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(crafted_metadata))


def harmful_tensor(checkpoint: Path, proof: Path) -> None:
    """A pickled object among the bytes of a tensor."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    index, info = next(iter(metadata.storage_data.items()))
    data = checkpoint / info.relative_path
    offset = data.stat().st_size
    with data.open("ab") as file:
        torch.save(_Harm(proof), file)
    place = _StorageInfo(info.relative_path, offset, data.stat().st_size - offset)
    storage = {**metadata.storage_data, index: place}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(replace(metadata, storage_data=storage)))


def incomplete(checkpoint: Path, _proof: Path) -> None:
    """The table lacks one of a tensor's boxes."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    key = "exp_avg.decoder.layers.mlp.linear_fc1.weight"
    tensor = metadata.state_dict_metadata[key]
    assert isinstance(tensor, TensorStorageMetadata)
    tensor.chunks.pop()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def of_another_shape(checkpoint: Path, _proof: Path) -> None:
    metadata = FileSystemReader(checkpoint).read_metadata()
    key = "master.decoder.final_layernorm.weight"
    tensor = metadata.state_dict_metadata[key]
    assert isinstance(tensor, TensorStorageMetadata)
    tensor.size = torch.Size([64])
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def truncated(checkpoint: Path, _proof: Path) -> None:
    (data,) = checkpoint.glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def marker_of_another_step(checkpoint: Path, _proof: Path) -> None:
    marker = json.loads((checkpoint / MARKER).read_text())
    (checkpoint / MARKER).write_text(json.dumps({**marker, "step": 3}))


def broken_marker(checkpoint: Path, _proof: Path) -> None:
    (checkpoint / MARKER).write_text('{"step": 4')


def newer_format(checkpoint: Path, _proof: Path) -> None:
    marker = json.loads((checkpoint / MARKER).read_text())
    (checkpoint / MARKER).write_text(json.dumps({**marker, "format": 99}))


DAMAGE = [
    random_bytes,
    gone,
    harmful_metadata,
    harmful_object,
    harmful_tensor,
    incomplete,
    of_another_shape,
    truncated,
    marker_of_another_step,
    broken_marker,
    newer_format,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_runs_nothing(
    damage: Callable[[Path, Path], None], unfinished: Path, spec: dict[str, Any], tmp_path: Path
) -> None:
    proof = tmp_path / "it ran"
    damage(step_folder(unfinished, 4), proof)
    message = refused(spec, unfinished)
    assert str(step_folder(unfinished, 4)) in message
    assert "\n" not in message
    assert not proof.exists()


def test_the_harm_would_work(finished: Finished, tmp_path: Path) -> None:
    """Without the checks the crafted checkpoint does run its code, so the tests above prove something."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    shutil.copytree(step_folder(finished.folder, 4), tmp_path / "checkpoint")
    proof = tmp_path / "it ran"
    harmful_object(tmp_path / "checkpoint", proof)
    state: dict[str, Any] = {HARMED: io.BytesIO()}
    reader = FileSystemReader(tmp_path / "checkpoint")
    torch.distributed.checkpoint.load(state, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
    assert proof.exists()


# -- what a resume restores


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"parallelism": {"distributedOptimizer": False}},
        {"lora": {"rank": 4, "targetModules": ["all"]}},
        {"lora": {"rank": 4, "targetModules": ["all"], "dropout": 0.2}},
    ],
    ids=["distributed optimizer", "plain optimizer", "LoRA", "LoRA with dropout"],
)
def test_a_bf16_resume_is_exact(change: dict[str, Any], spec: dict[str, Any], tmp_path: Path) -> None:
    """Compute weights, fp32 masters and moments, bit for bit, from step 2 on."""
    mine = merged(merged(spec, change), {"training": {"precision": "bf16"}})
    ends: list[dict[str, torch.Tensor]] = []

    def look(run: Run) -> None:
        assert run.training is not None
        ends.append(state_of(run))

    folder = tmp_path / "run"
    first = run_here(mine, folder, look)
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again" / "export.json").unlink()
    shutil.rmtree(step_folder(tmp_path / "again", 4))
    again = run_here(mine, tmp_path / "again", look)
    assert again.series("train/loss") == first.series("train/loss")
    one, other = ends
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []
    assert any(name.startswith("master") for name in one)


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """All that a step changes."""
    assert run.training is not None
    engine = run.training.engine
    found = {name: value.detach().clone() for name, value in engine.model.named_parameters()}
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        for number, (master, moments) in enumerate(part.optimizer.state.items()):
            found[f"master {number}"] = master.detach().clone()
            found |= {f"{name} {number}": torch.as_tensor(value).clone() for name, value in moments.items()}
    return found
