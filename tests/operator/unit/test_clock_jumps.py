"""A clock that jumps, and an attempt that writes after its end: neither may start, charge or forget anything."""

from __future__ import annotations

import pytest

from dpo_api.errors import Outcome
from dpo_testing.simcluster import SimCluster, manifest

HOUR = 3600.0


def running(**spec: object) -> SimCluster:
    cluster = SimCluster(manifest(**spec))
    cluster.run_to("Running")
    return cluster


@pytest.mark.parametrize("jump", [-24 * HOUR, -HOUR, HOUR, 24 * HOUR])
def test_a_jump_of_the_clock_touches_no_running_job(jump: float) -> None:
    cluster = running()
    cluster.say(step=5, metrics={"train/loss": 0.6})
    cluster.settle()
    calls = len(cluster.calls)
    for there in (jump, -jump, jump):
        cluster.advance(there)
        cluster.settle()
        assert cluster.state == "Running"
    assert (cluster.created, cluster.deleted) == (["job-1"], [])
    assert len(cluster.calls) - calls <= 6, "a jump is no reason to write without end"


@pytest.mark.parametrize("jump", [-24 * HOUR, 24 * HOUR])
def test_a_jump_between_two_attempts_ends_the_pause_once_at_most(jump: float) -> None:
    cluster = running(runPolicy={"maxRestarts": 2})
    cluster.end_pod("job-1-worker-0", Outcome.Communication)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    cluster.advance(jump)
    cluster.settle()
    cluster.sleep_out()
    cluster.run_to("Running")
    assert cluster.created == ["job-1", "job-2"]
    assert cluster.status["chargedRestarts"] == 1


def test_a_clock_that_is_set_back_ends_the_pause() -> None:
    """Nobody knows how much of it is left; waiting until the clock is where it was would take a day."""
    cluster = running(runPolicy={"maxRestarts": 2})
    cluster.end_pod("job-1-worker-0", Outcome.Communication)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.created == ["job-1"]
    cluster.advance(-24 * HOUR)
    cluster.settle()
    assert cluster.created == ["job-1", "job-2"]


def test_progress_is_written_on_after_the_clock_was_set_back() -> None:
    cluster = running()
    cluster.say(step=5, metrics={"train/loss": 0.6})
    cluster.settle()
    cluster.advance(-HOUR)
    cluster.say(step=6, metrics={"train/loss": 0.6})
    cluster.settle()
    assert cluster.status["progress"]["step"] == 6


def test_a_late_message_from_an_ended_attempt_does_not_change_the_next_one() -> None:
    cluster = running()
    cluster.lose_attempt(1)
    assert "job-1-worker-0" in cluster.pods, "kept for its log"
    reasons, before = cluster.event_reasons(), cluster.status
    # It comes back to life, and tells of an end: of a success, of an error that would be permanent.
    for outcome in (Outcome.Succeeded, Outcome.InvalidData):
        cluster.end_pod("job-1-worker-0", outcome, step=99, total=100, model_uri="s3://runs/zombie/model")
        cluster.settle()
        assert cluster.state == "Running"
        assert cluster.status["attempts"] == before["attempts"]
        assert (cluster.status.get("modelURI"), cluster.event_reasons()) == (None, reasons)
    assert cluster.created == ["job-1", "job-2"]
