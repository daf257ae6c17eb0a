"""A run directory that is damaged, incomplete, or another run's: what a new attempt reports, and what it keeps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import IncompatibleCheckpointError, Outcome
from dpo_testing.runs import Finished, finish, merged, run_here, start
from dpo_testing.training_world import LORA, make

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("run-directory")]


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    changes = {"training": {"maxSteps": 4}, "checkpoint": {"everySteps": 2}, "lora": LORA["lora"]}
    return merged(make(world, pairs=13), changes)


@pytest.fixture(scope="module")
def finished(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(spec, world / "finished")


@pytest.fixture
def folder(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run; export.json still names the first one's model, so it goes."""
    copy = tmp_path / "run"
    shutil.copytree(finished.folder, copy)
    (copy / "export.json").unlink()
    return copy


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("attempt", "{", "is damaged: "),
        ("attempt", "[]", "is damaged: not a JSON object"),
        ("attempt", '{"attempt": "two"}', "its attempt is 'two', not a number"),
        ("export.json", '{"step": 4', "is damaged: "),
        ("export.json", '{"step": 4, "spec": {}}', "a field is missing or has the wrong type ('model')"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str, expected: str, spec: dict[str, Any], folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(IncompatibleCheckpointError) as raised:
        run_here(spec, folder)
    assert f"{folder}/{name} is damaged: " in str(raised.value)
    assert expected in str(raised.value)
    assert "delete it to continue" in str(raised.value)
    assert (folder / name).read_text() == content


def test_a_damaged_file_ends_the_command_without_a_traceback(
    spec: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (folder / "attempt").write_text("{")
    child = start(spec, folder, processes=1, scratch=tmp_path / "scratch")
    finish(child, tmp_path / "scratch", code=Outcome.IncompatibleCheckpoint.exit_code)
    assert "Traceback" not in (tmp_path / "scratch" / "log").read_text()


def test_a_spec_with_a_field_that_was_removed_is_read(spec: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """By the launcher and by its workers: 0.1.0 wrote it."""
    older = {"transformerEngine": {"attention": False}}
    child = start(spec, folder, processes=1, scratch=tmp_path / "scratch", stored=older)
    assert finish(child, tmp_path / "scratch")["outcome"] == "Succeeded"


@pytest.mark.parametrize("lost", ["model", "model/model.safetensors", "model/adapter"])
def test_a_finished_run_whose_model_is_gone_writes_it_again(
    lost: str, spec: dict[str, Any], finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted((finished.folder / "model").rglob("*"))
    before = {path: path.read_bytes() for path in paths if path.is_file()}
    record = (finished.folder / "metrics.jsonl").read_bytes()
    gone = finished.folder / lost
    gone.unlink() if gone.is_file() else shutil.rmtree(gone)
    capsys.readouterr()
    run_here(spec, finished.folder)
    assert f"its model at {finished.folder}/model is missing: exporting it again" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert (finished.folder / "metrics.jsonl").read_bytes() == record
    run_here(spec, finished.folder)
    assert "nothing to do" in capsys.readouterr().out


def test_a_refused_run_fences_no_other_run(spec: dict[str, Any], folder: Path) -> None:
    """Another run's manifest with this run's directory: the run that trains there now is not disturbed."""
    before = (folder / "attempt").read_bytes()
    with pytest.raises(IncompatibleCheckpointError, match=r"spec.training.seed was 1234, now 7"):
        run_here(merged(spec, {"training": {"seed": 7}}), folder)
    assert (folder / "attempt").read_bytes() == before
    number = json.loads(before)["attempt"]
    run_here(spec, folder)
    assert json.loads((folder / "attempt").read_text())["attempt"] == number + 1


def test_a_run_that_is_asked_by_a_signal_shows_its_stacks(spec: dict[str, Any], tmp_path: Path) -> None:
    child = start(spec, tmp_path / "run", processes=1, scratch=tmp_path / "scratch", preloaded=False)
    with pytest.raises(AssertionError, match="most recent call first"):
        finish(child, tmp_path / "scratch", timeout=3)  # it takes longer than that to import torch
