"""A run that is stopped or killed and then resumed is the undisturbed run: every step once, the same trajectory."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_testing.preloaded import STEP_SECONDS
from dpo_testing.runs import Finished, finish, kill, merged, run_here, run_processes, start, wait_for_step
from dpo_testing.training_world import LORA
from dpo_testing.trajectories import checkpoints_in, differences, workers_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruption")]

STEPS, EVERY = 24, 8
SLOWLY = {STEP_SECONDS: "0.15"}
"""For runs that are disturbed: more than two seconds are left after the step that the test waits for."""


@pytest.fixture(scope="module")
def spec(slow_spec: dict[str, Any]) -> dict[str, Any]:
    return slow_spec


@pytest.fixture(scope="module")
def full(undisturbed: Finished) -> Finished:
    return undisturbed


@pytest.fixture(scope="module")
def lora(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(merged(spec, LORA), world / "LoRA, undisturbed")


def forget_reference(spec: dict[str, Any]) -> None:
    """Delete the cached reference, which must be there."""
    for table in list(Path(spec["reference"]["cacheURI"]).iterdir()):
        table.unlink()


def interrupted(
    spec: dict[str, Any],
    folder: Path,
    scratch: Path,
    how: Callable[[subprocess.Popen[bytes]], None],
    *,
    processes: int,
    code: int,
) -> dict[str, Any]:
    """Start a run, do something to it after step EVERY + 1, expect its exit code; return its termination message."""
    child = start(spec, folder, processes=processes, scratch=scratch, environment=SLOWLY)
    try:
        wait_for_step(folder, EVERY + 1)
        how(child)
        return finish(child, scratch, code=code)
    finally:
        if child.poll() is None:
            kill(child)


def ask(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)


def test_the_runs_are_worth_comparing(full: Finished, lora: Finished) -> None:
    for run in (full, lora):
        assert run.steps == list(range(1, STEPS + 1))
        assert min(run.series("train/preference_loss")) < 0.4
    assert differences(full, lora) != []


def test_stopped_by_sigterm_and_resumed_without_the_reference(
    full: Finished, spec: dict[str, Any], world: Path
) -> None:
    """Two processes, all weights trained. The stop comes after an earlier checkpoint of the same processes."""
    folder, scratch = world / "stopped", world / "stopped scratch"
    mine = merged(spec, {"reference": {"cacheURI": str(world / "reference of stopped")}})
    words = interrupted(mine, folder, scratch, ask, processes=2, code=143)
    assert words["outcome"] == "Stopped"
    assert EVERY < words["step"] < STEPS
    assert checkpoints_in(folder) == [EVERY, words["step"]]
    assert words["lastCheckpointStep"] == words["step"]
    assert f"checkpoint: {folder}/checkpoints/step-{words['step']:06d}" in words["message"]
    forget_reference(mine)
    assert differences(full, run_processes(mine, folder, processes=2, scratch=world / "resumed scratch")) == []


def test_lora_stopped_by_sigterm_and_resumed_by_another_number_of_processes(
    lora: Finished, spec: dict[str, Any], world: Path
) -> None:
    """One process, then two; the reference is kept. Only adapters are saved; the optimizer's shards move."""
    folder = world / "LoRA stopped"
    words = interrupted(merged(spec, LORA), folder, world / "LoRA scratch", ask, processes=1, code=143)
    assert (words["outcome"], checkpoints_in(folder)) == ("Stopped", [EVERY, words["step"]])
    resumed = run_processes(merged(spec, LORA), folder, processes=2, scratch=world / "LoRA resumed")
    assert differences(lora, resumed) == []


@pytest.mark.parametrize(("whole", "changes"), [("full", {}), ("lora", LORA)])
def test_killed_between_checkpoints_and_resumed(
    whole: str, changes: dict[str, Any], spec: dict[str, Any], world: Path, request: pytest.FixtureRequest
) -> None:
    folder, scratch = world / f"killed {whole}", world / f"killed {whole} scratch"
    mine = merged(spec, changes)
    child = start(mine, folder, processes=1, scratch=scratch, environment=SLOWLY)
    wait_for_step(folder, EVERY + 1)
    kill(child)
    assert not (scratch / "last-words.json").exists()
    assert checkpoints_in(folder)[-1] < max(Finished(folder).steps), "the kill lost nothing"
    # What a kill in the middle of a line would leave.
    with (folder / "metrics.jsonl").open("ab") as record:
        record.write(b'{"step": 11, "train/lo')
    assert differences(request.getfixturevalue(whole), run_here(mine, folder)) == []


def test_one_process_killed_ends_the_run_and_it_resumes(full: Finished, spec: dict[str, Any], world: Path) -> None:
    """The launcher reports it, the other process does not wait, and the next attempt begins at the checkpoint."""
    folder, scratch = world / "one killed", world / "one killed scratch"
    code = Outcome.Communication.exit_code
    words = interrupted(
        spec, folder, scratch, lambda _: os.kill(workers_of(scratch)[1], signal.SIGKILL), processes=2, code=code
    )
    assert "a process of this run exited without reporting a result" in words["message"]
    assert words["lastCheckpointStep"] in checkpoints_in(folder)
    assert "Traceback" not in (scratch / "log").read_text()
    assert differences(full, run_here(spec, folder)) == []
