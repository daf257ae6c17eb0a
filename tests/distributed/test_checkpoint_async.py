"""Checkpoints that are written while training goes on."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_api.errors import NoSpaceError
from dpo_store import open_store
from dpo_testing.runs import Finished, finish, job_of, kill, merged, run_here, run_processes, start, wait_for_step
from dpo_testing.trajectories import checkpoints_in, differences
from dpo_trainer.checkpoint import saving, store
from dpo_trainer.checkpoint.boxes import Box
from dpo_trainer.checkpoint.saving import Saver
from dpo_trainer.distributed import World
from dpo_trainer.engine import Engine
from dpo_trainer.run import Run, RunOptions
from dpo_trainer.rundir import RunDirectory, SavedCheckpoint
from dpo_trainer.stopping import StopRequest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruption")]

STEPS, EVERY = 24, 8
ASYNC = {"checkpoint": {"async": True, "everySteps": 2, "keep": 2}}


@pytest.fixture
def alone() -> Iterator[World]:
    world = World.join()
    yield world
    world.leave()


class Gate:
    """Holds the writing of a checkpoint until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        write = store.write

        def held(*args: Any) -> Any:
            self.entered.set()
            assert self.open.wait(120)
            if error is not None:
                raise error
            return write(*args)

        monkeypatch.setattr(store, "write", held)


def box(values: torch.Tensor) -> list[Box]:
    return [Box("master.x", (0,), tuple(values.shape), values)]


def test_what_is_saved_is_the_state_at_the_beginning(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it changes before anything is written, and the buffers are used again."""
    run = RunDirectory(open_store(), str(tmp_path))
    run.claim(None)
    saver = Saver(run, alone, background=True)
    state = torch.arange(5.0)
    for step in (1, 2):
        gate = Gate(monkeypatch)
        expected = state.clone()
        saver.begin(box(state), store.Marker(step=step, attempt=1, identity={}))
        saver.wait_for_copy()
        state += 1
        assert saver.busy
        assert run.checkpoints() == [SavedCheckpoint(1, run.checkpoint_uri(1))][: step - 1]
        gate.open.set()
        saved = saver.complete()
        assert saved is not None
        found = torch.full((5,), torch.nan)
        store.load(run, alone, box(found), saved, store.FORMAT)
        assert torch.equal(found, expected)
        monkeypatch.undo()
    assert saver.complete() is None


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_what_is_not_written_when_the_state_changes_is_copied_before(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """The writer is held after a number of boxes; those take no memory but that of the one which is being written."""
    run = RunDirectory(open_store(), str(tmp_path))
    run.claim(None)
    state = {"a": torch.arange(6.0), "b": torch.arange(5.0), "c": torch.arange(4.0)}
    expected = {name: values.clone() for name, values in state.items()}
    held, go = threading.Event(), threading.Event()
    take, taken = saving._StateAtBeginning.take, 0

    def taking(self: saving._StateAtBeginning, place: int) -> torch.Tensor:
        nonlocal taken
        if taken == written:
            held.set()
            assert go.wait(120)
        taken += 1
        return take(self, place)

    monkeypatch.setattr(saving._StateAtBeginning, "take", taking)
    saver = Saver(run, alone, background=True)
    boxes = [Box(name, (0,), tuple(values.shape), values) for name, values in state.items()]
    saver.begin(boxes, store.Marker(step=1, attempt=1, identity={}))
    save = saver._under_way
    assert save is not None
    assert save.state is not None
    if written < len(state):
        assert held.wait(60)
    else:
        assert save.thread is not None
        save.thread.join(60)
    saver.wait_for_copy()
    assert len(save.state._left) == len(state) - written
    for values in state.values():
        values.fill_(torch.nan)
    go.set()
    saved = saver.complete()
    assert saved is not None
    found = {name: torch.full_like(values, -1) for name, values in state.items()}
    boxes = [Box(name, (0,), tuple(values.shape), values) for name, values in found.items()]
    store.load(run, alone, boxes, saved, store.FORMAT)
    assert all(torch.equal(found[name], expected[name]) for name in state)


def test_no_update_begins_before_what_is_saved_is_copied_or_written(
    slow_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[Any] = []
    overlapping: list[bool] = []
    begin, update = Saver.begin, Engine._update

    def beginning(saver: Saver, *more: Any) -> None:
        begin(saver, *more)
        saves.append(saver._under_way)

    def updating(engine: Engine, *more: Any) -> None:
        overlapping.append(any(not save.state.may_change for save in saves))
        update(engine, *more)

    monkeypatch.setattr(Saver, "begin", beginning)
    monkeypatch.setattr(Engine, "_update", updating)
    run_here(merged(slow_spec, {"training": {"maxSteps": 4}, "checkpoint": {"async": True, "everySteps": 3}}), tmp_path)
    assert overlapping == [False] * 4
    assert checkpoints_in(tmp_path) == [3, 4]


def test_a_run_with_checkpoints_in_the_background_is_the_same(
    slow_spec: dict[str, Any], undisturbed: Finished, tmp_path: Path
) -> None:
    got = run_here(merged(slow_spec, ASYNC), tmp_path / "run")
    assert differences(undisturbed, got) == []
    assert checkpoints_in(tmp_path / "run") == [STEPS - 2, STEPS]


def attempt(spec: dict[str, Any], folder: Path, stop: StopRequest) -> None:
    world = World.join(seed=job_of(spec).spec.training.seed)
    try:
        Run(job_of(spec), world, stop, RunOptions(run_dir=str(folder))).execute()
    finally:
        world.leave()


def test_steps_go_on_while_a_checkpoint_is_written_and_a_failed_upload_ends_the_attempt(
    slow_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, NoSpaceError("the disk is full"))
    spec = merged(slow_spec, {"checkpoint": {"async": True, "everySteps": 4}})

    def release() -> None:
        assert gate.entered.wait(120)
        wait_for_step(tmp_path / "run", 6)
        gate.open.set()

    releasing = threading.Thread(target=release)
    releasing.start()
    with pytest.raises(NoSpaceError, match="the disk is full"):
        attempt(spec, tmp_path / "run", StopRequest())
    releasing.join()
    assert checkpoints_in(tmp_path / "run") == []


def test_a_stop_finishes_what_is_being_saved(slow_spec: dict[str, Any], undisturbed: Finished, tmp_path: Path) -> None:
    spec, run = merged(slow_spec, ASYNC), tmp_path / "run"
    child = start(spec, run, processes=2, scratch=tmp_path / "scratch")
    try:
        wait_for_step(run, 4)
        child.send_signal(signal.SIGTERM)
        words = finish(child, tmp_path / "scratch", code=143)
    finally:
        if child.poll() is None:
            kill(child)
    assert words["lastCheckpointStep"] == words["step"] == checkpoints_in(run)[-1]
    got = run_processes(spec, run, processes=1, scratch=tmp_path / "scratch 2")
    assert differences(undisturbed, got) == []


def test_a_stop_without_time_for_another_checkpoint_leaves_the_newest(
    slow_spec: dict[str, Any], tmp_path: Path
) -> None:
    """The grace period is used up when the stop is noticed: only what is being saved is finished."""
    from dpo_api.errors import StoppedError

    stop = StopRequest()
    spec, run = merged(slow_spec, {"checkpoint": {"async": True, "everySteps": 4}}), tmp_path / "run"

    def ask() -> None:
        wait_for_step(run, 6)
        stop.signalled, stop.asked_at = True, time.monotonic() - 10_000

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(StoppedError, match="too short for another checkpoint") as raised:
        attempt(spec, run, stop)
    asking.join()
    newest = checkpoints_in(run)[-1]
    assert newest % 4 == 0
    assert f"step-{newest:06d}" in str(raised.value)
