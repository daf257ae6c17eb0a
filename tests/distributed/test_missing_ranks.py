"""Runs in which one process is not like the others: it stops without ending, or is slow. It is named."""

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_api.progress import Progress
from dpo_testing.agents import begin
from dpo_testing.impatient import IMPATIENT, SECONDS, SLUGGISH
from dpo_testing.preloaded import usable
from dpo_testing.runs import Finished, kill, merged, wait_for_step
from dpo_testing.training_world import make
from dpo_testing.trajectories import workers_of
from dpo_trainer.pace import SLOW_RATIO, SLOW_STEPS
from dpo_trainer.results import read_results, summarise

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruption")]


@pytest.mark.skipif(not usable(), reason="needs forked processes")
def test_a_process_that_stops_is_named_by_the_others(slow_spec: dict[str, Any], tmp_path: Path) -> None:
    # Only steps, and more than the test can miss: elsewhere the others wait without this limit.
    changes = {"training": {"maxSteps": 2000, "validationInterval": 5000}, "checkpoint": {"everySteps": 5000}}
    spec = merged(slow_spec, changes)
    results = tmp_path / "results"
    child = begin(spec, tmp_path, 3)
    try:
        wait_for_step(tmp_path / "run", 2)
        os.kill(workers_of(tmp_path)[1], signal.SIGSTOP)
        (results / IMPATIENT).touch()
        code = child.wait(240)
    finally:
        kill(child)
    words = summarise(read_results(results), code, asked=False)
    assert words.outcome == Outcome.Communication.name, (tmp_path / "log").read_text()
    expected = r"waited (\d+) s in the [\w ]+: rank 1 has not arrived \(rank 1: [\w ]+, no word for"
    found = re.search(expected, words.message)
    assert found, words.message
    assert int(found[1]) >= SECONDS - 1
    assert sorted(result.rank for result in read_results(results) if result.explains) in ([0], [2], [0, 2])


@pytest.mark.skipif(not usable(), reason="needs forked processes")
@pytest.mark.parametrize(
    ("processes", "parallelism", "slow"),
    [
        (2, {}, 1),
        pytest.param(4, {"pipeline": 2, "verify": False}, 3, marks=pytest.mark.nightly),
    ],
)
def test_a_slow_process_is_named(processes: int, parallelism: dict[str, Any], slow: int, tmp_path: Path) -> None:
    """The others wait for it, in gathers of weights or for its stage's messages, and are not called slow for that."""
    changes = {
        "training": {"maxSteps": SLOW_STEPS + 2, "validationInterval": 100},
        "parallelism": parallelism,
        "checkpoint": {"everySteps": 100},
    }
    child = begin(merged(make(tmp_path, pairs=16), changes), tmp_path, processes, **{SLUGGISH: str(slow)})
    try:
        code = child.wait(240)
    finally:
        kill(child)
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    steps = [event for event in Finished(tmp_path / "run").events if "train/loss" in event]
    # A step reports the times of the one before it.
    assert [step.get("train/slowest_rank") for step in steps] == [None] + [slow] * (SLOW_STEPS + 1)
    assert min(step["train/slowest_rank_ratio"] for step in steps[1:]) > SLOW_RATIO
    said = [Progress.from_json(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert (said[-1].slow_rank, said[-1].slow_rank_host) == (slow, socket.gethostname())
    assert {one.slow_rank for one in said if one.step < SLOW_STEPS + 1} == {None}
    assert log.count(f"warning: rank {slow} on {socket.gethostname()} takes ") == 1
