"""A run that is stopped or killed and then resumed is the undisturbed run: every step once, the same trajectory."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_api.errors import Outcome
from dpo_testing.runs import Finished, finish, kill, merged, run_here, run_processes, start, wait_for_step
from dpo_testing.training_world import make
from dpo_trainer.rundir import MARKER

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruption")]

STEPS, EVERY = 24, 8
SERIES = ("train/loss", "train/preference_loss", "train/grad_norm", "train/lr", "train/consumed_samples", "val/loss")
REWARDS = ("train/rewards_chosen_mean", "train/rewards_rejected_mean", "val/rewards_margin")
REWARD_NOISE = 1e-6
"""A reward near zero is the difference of two sums near -50: fp32 bounds it absolutely, not relatively."""

LORA = {"lora": {"rank": 4, "alpha": 8, "targetModules": ["all"]}, "training": {"learningRate": 1e-2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interruption")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(world: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_CACHE_DIR", str(world / "cache"))
        yield


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    """Eight packs a step, so that a step takes long enough for a signal to find the run under way."""
    slow = {"maxSteps": STEPS, "learningRate": 1e-3, "validationInterval": 6, "packing": {"enabled": False}}
    return merged(make(world, pairs=21), {"training": slow, "checkpoint": {"everySteps": EVERY}})


@pytest.fixture(scope="module")
def full(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(spec, world / "full, undisturbed")


@pytest.fixture(scope="module")
def lora(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(merged(spec, LORA), world / "LoRA, undisturbed")


def differences(one: Finished, other: Finished) -> list[str]:
    """Sentences that say where two runs differ; none when they are one trajectory."""
    found = [] if other.steps == one.steps else [f"the steps are {other.steps}, not {one.steps}"]
    for key in (*SERIES, *REWARDS):
        expected, got = np.array(one.series(key)), np.array(other.series(key))
        if expected.shape != got.shape:
            found.append(f"{key} has {len(got)} values, not {len(expected)}")
            continue
        noise = REWARD_NOISE if key in REWARDS else 0.0
        bad = np.abs(got - expected) > 1e-5 * np.abs(expected) + noise
        found += [f"{key}[{i}] is {got[i]!r}, not {expected[i]!r}" for i in np.flatnonzero(bad)[:2]]
    for name, tensor in one.weights.items():
        gap = (tensor - other.weights[name]).abs().max().item()
        if gap > 1e-5:
            found.append(f"{name} ends {gap:.1e} away")
    return found


def complete(folder: Path) -> list[int]:
    """The steps whose checkpoints exist."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob(f"checkpoints/*/{MARKER}"))


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
    """Start a run, do something to it after step EVERY + 1, expect its exit code; returns its last words."""
    child = start(spec, folder, processes=processes, scratch=scratch)
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
    assert complete(folder) == [EVERY, words["step"]]
    assert f"checkpoint: {folder}/checkpoints/step-{words['step']:06d}" in words["message"]
    forget_reference(mine)
    assert differences(full, run_processes(mine, folder, processes=2, scratch=world / "resumed scratch")) == []


def test_lora_stopped_by_sigterm_and_resumed_by_another_number_of_processes(
    lora: Finished, spec: dict[str, Any], world: Path
) -> None:
    """One process, then two; the reference is kept. Only adapters are saved, and the optimizer's shards change hands."""
    folder = world / "LoRA stopped"
    words = interrupted(merged(spec, LORA), folder, world / "LoRA scratch", ask, processes=1, code=143)
    assert (words["outcome"], complete(folder)) == ("Stopped", [EVERY, words["step"]])
    resumed = run_processes(merged(spec, LORA), folder, processes=2, scratch=world / "LoRA resumed")
    assert differences(lora, resumed) == []


def test_killed_between_checkpoints_and_resumed(full: Finished, spec: dict[str, Any], world: Path) -> None:
    folder, scratch = world / "killed", world / "killed scratch"
    child = start(spec, folder, processes=1, scratch=scratch)
    wait_for_step(folder, EVERY + 1)
    kill(child)
    assert not (scratch / "last-words.json").exists()
    assert complete(folder)[-1] < max(Finished(folder).steps), "nothing was lost: the kill came too late to test it"
    # What a kill in the middle of a line would leave.
    with (folder / "metrics.jsonl").open("ab") as record:
        record.write(b'{"step": 11, "train/lo')
    assert differences(full, run_here(spec, folder)) == []


def worker_of(child: subprocess.Popen[bytes], rank: int) -> int:
    """The process id of a worker of the launcher's, by its rank."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environment.read_bytes().split(b"\0")
            command = (environment.parent / "cmdline").read_bytes()
        except OSError:
            continue
        words = child.args if isinstance(child.args, list) else []
        if f"RANK={rank}".encode() in variables and b"\0worker\0" in command and str(words[4]).encode() in command:
            return int(environment.parent.name)
    raise LookupError(f"no worker of rank {rank}")


def test_one_process_killed_ends_the_run_and_it_resumes(full: Finished, spec: dict[str, Any], world: Path) -> None:
    """The launcher reports it, the other process does not wait, and the next attempt begins at the checkpoint."""
    folder, scratch = world / "one killed", world / "one killed scratch"
    code = Outcome.Communication.exit_code
    words = interrupted(
        spec, folder, scratch, lambda child: os.kill(worker_of(child, 1), signal.SIGKILL), processes=2, code=code
    )
    assert "a process of this run ended without a word" in words["message"]
    assert "Traceback" not in (scratch / "log").read_text()
    assert differences(full, run_here(spec, folder)) == []
