"""Stops at unusual times: before the workers listen, before training, at the time limit, after the launcher died."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from dpo_api.errors import Outcome, StoppedError
from dpo_testing.runs import Finished, finish, job_of, kill, merged, run_here, start, wait_for_step
from dpo_testing.training_world import make
from dpo_testing.trajectories import checkpoints_in, differences, workers_of
from dpo_trainer.distributed import World, lost_contact
from dpo_trainer.launch import _Forwarding
from dpo_trainer.results import RankResult, summarise
from dpo_trainer.run import Run, RunOptions
from dpo_trainer.stopping import StopRequest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruption")]

STEPS, EVERY = 24, 8


@pytest.fixture(scope="module")
def spec(slow_spec: dict[str, Any]) -> dict[str, Any]:
    return slow_spec


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 180) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def stopped_after(spec: dict[str, Any], folder: Path, stop: StopRequest, when: Callable[[Run], bool]) -> str:
    """Run in this process until ``when`` holds at a report, and then ask to stop; the message of the stop."""
    job = job_of(spec)
    world = World.join(seed=job.spec.training.seed)
    try:
        run = Run(job, world, stop, RunOptions(run_dir=str(folder)))
        for name in ("stepped", "phase"):
            _before(run, name, lambda: stop_now(stop) if when(run) else None)
        with pytest.raises(StoppedError) as raised:
            run.execute()
        run.failed(raised.value.outcome, str(raised.value))
    finally:
        world.leave()
    return str(raised.value)


def stop_now(stop: StopRequest) -> None:
    if stop.limit_seconds is None:
        stop.signalled = True
    else:
        stop.started = time.monotonic() - stop.limit_seconds


def _before(run: Run, name: str, action: Callable[[], None]) -> None:
    report = getattr(run.reporter, name)

    def reported(*args: Any, **kwargs: Any) -> None:
        action()
        report(*args, **kwargs)

    setattr(run.reporter, name, reported)


def test_a_signal_before_the_workers_listen_ends_the_run_as_stopped(spec: dict[str, Any], world: Path) -> None:
    """The imports take seconds. A worker that already listens would wait for one that the signal has ended."""
    folder, scratch = world / "importing", world / "importing scratch"
    child = start(spec, folder, processes=2, scratch=scratch, preloaded=False)
    try:
        wait_until(lambda: len(workers_of(scratch)) == 2, "no workers came up")
        child.send_signal(signal.SIGTERM)
        words = finish(child, scratch, code=143)
    finally:
        if child.poll() is None:
            kill(child)
    assert (words["outcome"], words["step"]) == ("Stopped", 0)
    assert "lastCheckpointStep" not in words
    assert "Traceback" not in (scratch / "log").read_text()
    assert not checkpoints_in(folder)


def test_a_lost_launcher_takes_its_processes_with_it(undisturbed: Finished, spec: dict[str, Any], world: Path) -> None:
    folder, scratch = world / "orphans", world / "orphans scratch"
    child = start(spec, folder, processes=2, scratch=scratch)
    try:
        wait_for_step(folder, EVERY + 1)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        wait_until(lambda: not workers_of(scratch), "the workers outlive their launcher")
    finally:
        for process in workers_of(scratch).values():
            os.kill(process, signal.SIGKILL)
    assert EVERY < checkpoints_in(folder)[-1] < STEPS  # they were asked to stop, not killed
    assert differences(undisturbed, run_here(spec, folder)) == []


def test_the_time_limit_stops_with_a_checkpoint(undisturbed: Finished, spec: dict[str, Any], world: Path) -> None:
    folder = world / "limited"
    stop = StopRequest(limit_seconds=3600.0)
    message = stopped_after(spec, folder, stop, lambda run: run.training is not None and run.training.step == EVERY + 2)
    assert "training.maxRunSeconds (3600 s) is used up" in message
    assert f"after step {EVERY + 2} of {STEPS}" in message
    assert checkpoints_in(folder) == [EVERY, EVERY + 2]
    assert differences(undisturbed, run_here(spec, folder)) == []


def test_the_time_limit_reaches_the_processes(spec: dict[str, Any], world: Path) -> None:
    """A limit that is used up before training: both processes leave by themselves, nobody has sent a signal."""
    limited = merged(spec, {"training": {"maxRunSeconds": 1}, "data": {"maxLength": 120}})  # an index of its own
    scratch = world / "short scratch"
    words = finish(start(limited, world / "short", processes=2, scratch=scratch), scratch, code=143)
    assert words["outcome"] == "Stopped"
    assert "training.maxRunSeconds (1 s) is used up" in words["message"]
    assert "Traceback" not in (scratch / "log").read_text()


@pytest.mark.parametrize("phase", ["index", "reference"])
def test_a_stop_before_training_leaves_a_directory_to_start_again_in(
    phase: str, undisturbed: Finished, spec: dict[str, Any], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_CACHE_DIR", str(world / f"cache of {phase}"))
    folder, cache = world / f"stopped in {phase}", world / f"reference of {phase}"
    mine = merged(spec, {"reference": {"cacheURI": str(cache)}})
    message = stopped_after(mine, folder, StopRequest(), lambda run: _phase(run) == phase)
    assert phase in message
    assert not (folder / "metrics.jsonl").exists()
    # A stop in the first index leaves the second for later: an index pass can be longer than any grace period.
    indexes = [path for path in (world / f"cache of {phase}" / "index").iterdir() if path.is_dir()]
    assert len(indexes) == (1 if phase == "index" else 2)
    assert differences(undisturbed, run_here(mine, folder)) == []


def test_a_stop_during_the_reference_pass_keeps_what_was_computed(world: Path) -> None:
    """70 pairs are computed 64 at a time."""
    (world / "more").mkdir()
    spec = merged(make(world / "more", pairs=70), {"training": {"maxSteps": 9, "validationInterval": 100}})
    cache = Path(spec["reference"]["cacheURI"])
    message = stopped_after(spec, world / "middle", StopRequest(), lambda run: _phase(run) == "reference")
    assert "the cache keeps what was computed" in message
    (table,) = cache.iterdir()
    known = load_file(table)["sums"].isfinite().all(dim=1)
    assert int(known.sum()) == 64
    before = load_file(table)["sums"][known]
    run_here(spec, world / "middle")
    after = load_file(table)["sums"]
    assert after.isfinite().all()
    assert after[known].equal(before)


def _phase(run: Run) -> str:
    hub = run.reporter._hub
    return "" if hub is None else hub.progress.newest.phase


# -- what the launcher makes of it


def result(rank: int, outcome: Outcome, message: str) -> RankResult:
    return RankResult(rank=rank, outcome=outcome.name, message=message, at=float(rank))


def test_a_lost_process_of_a_stopped_run_is_a_stop_that_saved_nothing() -> None:
    words = summarise([result(0, Outcome.Communication, "lost contact")], 143, asked=True)
    assert words.outcome == "Stopped"
    assert "the last saved checkpoint is older" in words.message
    both = [result(0, Outcome.Communication, "lost contact"), result(1, Outcome.Stopped, "after step 7")]
    assert summarise(both, 143, asked=True).message == "after step 7"
    assert summarise(both[:1], 1, asked=False).outcome == "Communication"


def test_a_signal_before_the_child_is_passed_on_once() -> None:
    """torchrun that gets a second one stops waiting for its workers."""
    lines = [
        "import signal, sys",
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))",
        "print('ready', flush=True)",
        "sys.stdin.read()",
    ]
    with _Forwarding() as stop:
        command = [sys.executable, "-c", "\n".join(lines)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        stop.to(child)
        assert child.stdout.readline() == "asked\n"  # else the kernel would make one signal of the two
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert child.communicate()[0] == ""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:2"), True),
        (CheckpointException("load", {0: (RuntimeError("Connection reset by peer"), None)}), True),  # type: ignore[dict-item]
        (CheckpointException("load", {0: (EOFError("short"), None)}), False),  # type: ignore[dict-item]
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_a_lost_process_is_distinguished_from_a_damaged_file(error: BaseException, lost: bool) -> None:
    """While a checkpoint is loaded, a lost process must not pass for an incompatible checkpoint, which is permanent."""
    assert lost_contact(error) is lost
