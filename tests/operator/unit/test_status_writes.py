"""Status writes of a job that changes several times within a second are one, unless something waits for them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from dpo_api.errors import Outcome
from dpo_operator.reconcile import WRITE_SECONDS, reconcile
from dpo_operator.types import EmitEvent
from dpo_testing.simcluster import Crash, SimCluster, manifest


def accepted() -> SimCluster:
    """Return a cluster whose job was accepted just now."""
    cluster = SimCluster()
    cluster.delays = True
    cluster.reconcile()
    assert cluster.calls == ["PatchStatus", "EmitEvent"]
    return cluster


def started() -> SimCluster:
    """Return a cluster whose job has a PyTorchJob that no status names yet."""
    cluster = accepted()
    cluster.advance(0.2)
    cluster.settle()
    assert cluster.attempts == []
    return cluster


def test_what_was_created_is_recorded_with_what_follows_within_the_second() -> None:
    cluster = started()
    assert cluster.calls[2:] == ["CreateConfigMap", "CreateNetworkPolicy", "CreateChild"]
    assert cluster.decision.delayed
    assert cluster.decision.wake == pytest.approx(WRITE_SECONDS - 0.2)
    cluster.run_pods()
    cluster.settle()
    assert cluster.decision.scrape is not None, "the trainer is asked meanwhile"
    cluster.say(step=3, metrics={"train/loss": 0.5})
    cluster.settle()
    assert (cluster.state, len(cluster.calls)) == ("Pending", 5)
    cluster.sleep()
    assert cluster.calls[5:] == ["EmitEvent", "EmitEvent", "PatchStatus"]
    assert cluster.event_reasons() == ["Accepted", "PyTorchJobCreated", "TrainingStarted"]
    assert (cluster.state, cluster.status["progress"]["step"]) == ("Running", 3)
    assert cluster.status["networkPolicy"] in cluster.network_policies


def test_the_next_write_a_second_later_waits_for_nothing() -> None:
    cluster = started()
    cluster.sleep()
    assert cluster.state == "Starting"
    cluster.advance(WRITE_SECONDS)
    cluster.run_pods()
    cluster.settle()
    assert cluster.state == "Running"


def ends(cluster: SimCluster) -> None:
    for role in ("worker", "master"):
        cluster.end_pod(f"job-1-{role}-0", Outcome.Succeeded, step=9, total=9, model_uri="s3://runs/job/model")


@pytest.mark.parametrize(
    ("change", "result"),
    [
        (lambda cluster: cluster.end_pod("job-1-worker-0", Outcome.Communication), "Failed"),
        (lambda cluster: cluster.edit(suspend=True), "Stopped"),
        (ends, "Succeeded"),
    ],
    ids=["failed", "suspended", "succeeded"],
)
def test_the_end_of_an_attempt_is_written_at_once(change: Callable[[SimCluster], None], result: str) -> None:
    cluster = started()
    cluster.run_pods()
    cluster.settle()
    before = len(cluster.calls)
    change(cluster)
    cluster.settle()
    assert [attempt["result"] for attempt in cluster.attempts] == [result]
    assert "PatchStatus" in cluster.calls[before:]


def test_what_ails_a_pod_is_written_at_once() -> None:
    """A pod that is being deleted may be gone a moment later, and with it what shows why the attempt ended."""
    cluster = started()
    cluster.run_pods()
    cluster.settle()
    assert cluster.attempts == []
    cluster.delete_pod("job-1-master-0")
    cluster.reconcile()
    assert [attempt["number"] for attempt in cluster.attempts] == [1]


def test_the_next_attempt_does_not_wait() -> None:
    cluster = started()
    cluster.run_pods()
    cluster.settle()
    cluster.end_pod("job-1-worker-0", Outcome.Communication)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert "endTime" in cluster.attempts[0], "the pass that needs the stored end is due at once"


def test_an_operator_that_is_killed_within_the_second_finds_what_it_created() -> None:
    for budget in range(6):
        cluster = accepted()
        with contextlib.suppress(Crash):
            cluster.reconcile(budget=budget)
        cluster.settle()
        cluster.advance(WRITE_SECONDS)
        cluster.settle()
        assert cluster.created == ["job-1"]
        assert [attempt["number"] for attempt in cluster.attempts] == [1]


@pytest.mark.parametrize("delays", [False, True])
def test_an_operator_that_has_not_seen_the_last_write_names_the_event_alike(delays: bool) -> None:
    """Else two operators would report twice that an attempt started."""
    cluster = SimCluster()
    cluster.delays = delays
    cluster.reconcile()
    earlier = copy.deepcopy(cluster.job)
    cluster.settle()
    cluster.advance(WRITE_SECONDS)
    cluster.settle()
    assert cluster.state == "Starting"
    cluster.advance(WRITE_SECONDS)
    cluster.run_pods()
    observed = cluster.observed()

    def event(job: object) -> str:
        seen = replace(observed, job=job, written=None)  # type: ignore[arg-type]
        actions = reconcile(seen, cluster.now, cluster.settings).actions
        (name,) = (
            action.body["metadata"]["name"]
            for action in actions
            if isinstance(action, EmitEvent) and action.body["reason"] == "TrainingStarted"
        )
        return str(name)

    assert event(earlier) == event(cluster.job)


def test_a_clock_that_was_set_back_delays_nothing() -> None:
    cluster = accepted()
    cluster.advance(-60)
    cluster.settle()
    assert cluster.state == "Starting"


def test_a_rejection_is_written_at_once() -> None:
    cluster = SimCluster(manifest(dpo={"preferenceWeight": 0}))
    cluster.delays = True
    cluster.reconcile()
    assert cluster.state == "Rejected"
