"""What launch derives before any process starts, and how it sums up what they leave."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import InvalidSpecError, Outcome
from dpo_operator.backend.pytorchjob import digest
from dpo_testing.runs import job_of
from dpo_trainer.distributed import check_device
from dpo_trainer.entry import command_line
from dpo_trainer.launch import allocator, launch, processes_here, switches
from dpo_trainer.results import RankResult, read_results, summarise

SPEC: dict[str, Any] = {"model": {"huggingFace": {"uri": "m"}}, "data": {"train": [{"uri": "d"}]}}


def test_switches_are_set_only_where_the_spec_asks() -> None:
    assert switches(job_of(SPEC).spec) == {}
    asked = {**SPEC, "transformerEngine": {"flashAttention": False}, "training": {"deterministic": True}}
    assert switches(job_of(asked).spec) == {
        "NVTE_FLASH_ATTN": "0",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def test_the_allocators_settings_give_way_to_those_of_the_environment() -> None:
    """torch reads both names; the second is the older one."""
    assert allocator({"PATH": "/bin"}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert allocator({name: "max_split_size_mb:64"}) == {}


@pytest.mark.parametrize(
    ("stated", "resources", "expected"),
    [
        ({}, {}, 1),
        ({}, {"gpusPerNode": 8}, 8),
        ({}, {"gpusPerNode": 0, "processesPerNode": 3}, 3),
        ({}, {"gpusPerNode": 8, "processesPerNode": 4}, 4),
        ({"PET_NPROC_PER_NODE": "2"}, {"gpusPerNode": 8}, 2),
        ({"PET_NPROC_PER_NODE": "auto"}, {"gpusPerNode": 8}, 8),
    ],
)
def test_how_many_processes_a_node_starts(stated: dict[str, str], resources: dict[str, int], expected: int) -> None:
    assert processes_here(stated, job_of({**SPEC, "resources": resources}).spec.resources) == expected


def test_a_process_without_a_gpu_is_told_so() -> None:
    check_device(1, 2)
    with pytest.raises(InvalidSpecError, match=r"process 2 .*there are 2; start 2 with resources.processesPerNode"):
        check_device(2, 2)


def test_what_cannot_run_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(job_of({**SPEC, "checkpoint": {"monitor": "val/loss"}}).to_json())
    words = tmp_path / "words"
    arguments = command_line().parse_args(["launch", f"--spec={spec}", f"--last-words={words}"])
    assert launch(arguments) == Outcome.InvalidSpec.exit_code
    assert "spec.checkpoint.monitor" in json.loads(words.read_text())["message"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", None], ids=["another spec", "no file"])
def test_a_spec_that_was_not_accepted_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    spec, words, accepted = tmp_path / "spec.json", tmp_path / "words", digest(job_of(SPEC).to_json())
    if content is not None:
        spec.write_text(content)
    asked = ["launch", f"--spec={spec}", f"--spec-digest={accepted}", f"--last-words={words}"]
    code = launch(command_line().parse_args(asked))
    said = json.loads(words.read_text())
    assert (said["outcome"], code) == (("InvalidSpec", 2) if content is not None else ("NotFound", 11))
    assert Outcome[said["outcome"]].retry == "permanent"
    assert str(spec) in said["message"]
    if content is not None:
        assert f"its digest is {digest(content)}, not {accepted}" in said["message"]
    assert "Traceback" not in capsys.readouterr().err


def test_the_accepted_spec_is_read(tmp_path: Path) -> None:
    """The next check is the first that this spec does not pass."""
    spec, words = tmp_path / "spec.json", tmp_path / "words"
    text = job_of({**SPEC, "checkpoint": {"monitor": "val/loss"}}).to_json()
    spec.write_text(text)
    asked = ["launch", f"--spec={spec}", f"--spec-digest={digest(text)}", f"--last-words={words}"]
    assert launch(command_line().parse_args(asked)) == Outcome.InvalidSpec.exit_code
    assert "spec.checkpoint.monitor" in json.loads(words.read_text())["message"]


def result(rank: int, outcome: Outcome, at: float, message: str = "") -> RankResult:
    return RankResult(rank=rank, outcome=outcome.name, message=message, at=at)


def test_the_first_cause_explains_the_run_not_its_consequences(tmp_path: Path) -> None:
    for entry in (
        result(0, Outcome.Communication, 1.0, "lost contact"),
        result(1, Outcome.InvalidData, 2.0, "line 7"),
        result(2, Outcome.NoSpace, 3.0, "full"),
    ):
        entry.write(tmp_path)
    words = summarise(read_results(tmp_path), 1, asked=False)
    assert (words.outcome, words.message) == ("InvalidData", "line 7")


def test_last_words_name_the_checkpoint_that_is_there_not_the_step_that_is_lost() -> None:
    lost = replace(result(0, Outcome.Communication, 1.0, "lost contact"), step=57)
    words = summarise([lost], 143, asked=True)
    assert (words.outcome, words.step, words.last_checkpoint_step) == ("Stopped", 57, None)
    words = summarise([lost, replace(lost, rank=1, last_checkpoint_step=50)], 75, asked=False)
    assert (words.outcome, words.step, words.last_checkpoint_step) == ("Communication", 57, 50)


def test_a_process_that_left_no_word_is_not_taken_for_a_lost_network() -> None:
    words = summarise([result(0, Outcome.Communication, 1.0, "lost contact")], 1, asked=False)
    assert "without reporting a result" in words.message


def test_nothing_left_at_all() -> None:
    assert summarise([], 1, asked=True).outcome == "Stopped"
    assert summarise([], -9, asked=False).outcome == "Internal"
