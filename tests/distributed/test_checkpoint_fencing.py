"""One owner at a time: an attempt that seemed dead completes nothing once another attempt owns the run directory."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import FencedError, Outcome
from dpo_store import open_store
from dpo_testing.runs import Finished, finish, kill, run_here, start, wait_for_step
from dpo_testing.trajectories import checkpoints_in, differences, workers_of
from dpo_trainer.checkpoint import files
from dpo_trainer.checkpoint import store as checkpoints
from dpo_trainer.distributed import World
from dpo_trainer.metrics.jsonl import LocalLog
from dpo_trainer.rundir import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruption")]

EVERY = 8


def directory(folder: Path) -> RunDirectory:
    return RunDirectory(open_store(), str(folder))


@pytest.fixture
def alone() -> Iterator[World]:
    world = World.join()
    yield world
    world.leave()


def save(run: RunDirectory, world: World, step: int) -> None:
    marker = checkpoints.Marker(step=step, attempt=run.attempt, identity={})
    checkpoints.save(run, world, [], marker)


def test_a_lower_attempt_completes_no_checkpoint(tmp_path: Path, alone: World) -> None:
    old, new = directory(tmp_path), directory(tmp_path)
    assert old.claim(None) == 1
    save(old, alone, 1)
    assert new.claim(None) == 2
    with pytest.raises(FencedError, match="attempt 2 owns the run directory"):
        save(old, alone, 2)
    save(new, alone, 3)
    assert checkpoints_in(tmp_path) == [1, 3]


def test_a_takeover_during_the_save_is_noticed(tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = directory(tmp_path), directory(tmp_path)
    old.claim(None)
    write = files.write

    def slow(*args: Any, **kwargs: Any) -> Any:
        written = write(*args, **kwargs)
        new.claim(None)
        return written

    monkeypatch.setattr(files, "write", slow)
    with pytest.raises(FencedError):
        save(old, alone, 2)
    assert checkpoints_in(tmp_path) == []


def test_a_lower_number_may_not_claim(tmp_path: Path) -> None:
    directory(tmp_path).claim(5)
    with pytest.raises(FencedError, match="attempt 5 owns"):
        directory(tmp_path).claim(4)
    assert directory(tmp_path).claim(5) == 5  # the same number again: the last claimant owns the directory


def test_of_two_attempts_with_one_number_the_later_one_owns_the_directory(tmp_path: Path, alone: World) -> None:
    """Two machines that start the same run at the same moment read the same number."""
    first, second = directory(tmp_path), directory(tmp_path)
    first.claim(3)
    second.claim(3)
    with pytest.raises(FencedError, match="another attempt 3 owns"):
        save(first, alone, 1)
    save(second, alone, 1)
    assert checkpoints_in(tmp_path) == [1]


@contextmanager
def frozen(child: subprocess.Popen[bytes], scratch: Path) -> Iterator[None]:
    """Suspend all processes of a run, as on a machine that hangs, and continue them afterwards."""
    family = [child.pid, *workers_of(scratch).values()]
    for process in family:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in family:
            os.kill(process, signal.SIGCONT)


def test_a_run_that_wakes_up_late_changes_nothing(
    slow_spec: dict[str, Any], undisturbed: Finished, tmp_path: Path
) -> None:
    spec = slow_spec
    folder, scratch = tmp_path / "run", tmp_path / "scratch"
    child = start(spec, folder, processes=1, scratch=scratch)
    try:
        wait_for_step(folder, EVERY + 1)
        with frozen(child, scratch):
            assert checkpoints_in(folder) == [EVERY]
            second = run_here(spec, folder)
            assert differences(undisturbed, second) == []
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        words = finish(child, scratch, code=Outcome.Fenced.exit_code)
    finally:
        if child.poll() is None:
            kill(child)
    assert words["outcome"] == "Fenced"
    assert "attempt 2 owns the run directory" in words["message"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_record_that_is_taken_over_gets_no_line_of_its_former_owner(tmp_path: Path) -> None:
    """Even if the new owner had nothing to remove."""
    path = tmp_path / "metrics.jsonl"
    former = LocalLog(path, None)
    former.write(1, {"train/loss": 0.5})
    latter = LocalLog(path, 1)
    former.write(2, {"train/loss": 0.25})
    latter.write(2, {"train/loss": 0.125})
    former.close()
    latter.close()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert events == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.125}]
