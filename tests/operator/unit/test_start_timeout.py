"""runPolicy.startTimeoutSeconds spans the attempts that never had all their pods running."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_operator.classification import cause_of_pod
from dpo_operator.reasons import Reason
from dpo_testing.simcluster import SimCluster, manifest

Object = dict[str, Any]


def give_up(cluster: SimCluster, after: float) -> None:
    """Let the newest attempt's worker look for its master, and give up ``after`` seconds later."""
    worker = cluster.pods[f"{cluster.attempts[-1]['child']}-worker-0"]
    worker["status"]["initContainerStatuses"] = [{"name": "init-pytorch", "state": {"running": {}}}]
    cluster.settle()
    cluster.advance(after)
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    worker["status"] |= {"phase": "Failed", "initContainerStatuses": [{"name": "init-pytorch", "state": ended}]}
    cluster.settle()


def preferences(child: Object) -> Any:
    return child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"].get("affinity")


def test_cold_nodes_cost_nothing_before_the_start_time_out() -> None:
    """training-operator's own init container gives up after 100 tries, however long the master's image is."""
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 1800, "maxRestarts": 0}))
    cluster.settle()
    for number in range(1, 18):
        give_up(cluster, 105)
        assert cluster.attempts[-1]["reason"] == "InitContainerFailed"
        assert cluster.attempts[-1]["failureClass"] == "retryable"
        assert cluster.status["startingSeconds"] == 105 * number
        cluster.sleep_out()
        assert preferences(cluster.children[f"job-{number + 1}"]) is None, "no node is to blame"
    assert cluster.status["chargedRestarts"] == 0
    cluster.run_to("Running")
    assert "startingSeconds" not in cluster.status


def test_the_start_time_out_ends_the_attempt_that_it_falls_into_and_is_charged_once() -> None:
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 600, "maxRestarts": 1}))
    cluster.settle()
    for span in (0, 1):
        for _ in range(2):
            give_up(cluster, 250)
            cluster.sleep_out()
        assert cluster.status["chargedRestarts"] == span
        cluster.advance(99)
        cluster.settle()
        assert cluster.attempts[-1].get("reason") is None
        cluster.advance(1)
        cluster.settle()
        assert cluster.attempts[-1]["reason"] == "StartTimeout"
        assert "600 s after the first of several admissions" in cluster.attempts[-1]["message"]
        cluster.sleep_out()
    assert cluster.condition("Failed") == ("True", "RestartsExhausted")
    assert len(cluster.attempts) == 6


def test_an_init_container_that_gives_up_after_the_start_time_out_is_charged() -> None:
    """The operator was away when the time was up."""
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 600, "maxRestarts": 1}))
    cluster.settle()
    give_up(cluster, 700)
    assert cluster.attempts[-1]["reason"] == "InitContainerFailed"
    assert (cluster.state, cluster.status["chargedRestarts"]) == ("Restarting", 1)
    assert "startingSeconds" not in cluster.status, "the next attempt has the whole time"
    cluster.sleep_out()
    give_up(cluster, 300)
    assert (cluster.state, cluster.status["chargedRestarts"]) == ("Restarting", 1)


def test_time_while_suspended_or_queued_does_not_count() -> None:
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 600, "queueName": "team"}))
    cluster.settle()
    cluster.advance(200)
    cluster.settle()
    cluster.children["job-1"]["spec"]["runPolicy"]["suspend"] = True  # preempted by its queue
    cluster.settle()
    assert (cluster.state, cluster.status["startingSeconds"]) == ("Queued", 200)
    cluster.advance(5000)
    cluster.settle()
    del cluster.children["job-1"]["spec"]["runPolicy"]["suspend"]
    del cluster.children["job-1"]["_podsMade"]
    cluster.settle()
    cluster.advance(200)
    cluster.settle()
    assert cluster.state == "Starting"
    cluster.edit(suspend=True)
    cluster.settle()
    assert (cluster.state, cluster.status["startingSeconds"]) == ("Suspended", 400)
    cluster.advance(5000)
    cluster.settle()
    cluster.edit(suspend=False)
    cluster.settle()
    cluster.advance(199)
    cluster.settle()
    assert cluster.state == "Starting"
    cluster.advance(1)
    cluster.settle()
    assert cluster.attempts[-1]["reason"] == "StartTimeout"


def test_a_status_of_an_older_operator_has_the_whole_time_from_its_admission() -> None:
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 600}))
    cluster.settle()
    assert "startingSeconds" not in cluster.status
    cluster.advance(600)
    cluster.settle()
    assert cluster.attempts[-1]["reason"] == "StartTimeout"
    assert "600 s after admission" in cluster.attempts[-1]["message"]


@pytest.mark.parametrize(
    ("metadata", "finished", "reason"),
    [
        ({}, None, Reason.InitContainerFailed),
        ({"deletionTimestamp": "2026-01-01T00:10:00Z"}, "2026-01-01T00:00:01Z", Reason.PodDeleted),
        ({"deletionTimestamp": "2026-01-01T00:10:00Z"}, None, Reason.PodDeleted),
        ({"deletionTimestamp": "2026-01-01T00:20:00Z"}, "2026-01-01T00:00:01Z", Reason.InitContainerFailed),
    ],
)
def test_an_init_container_that_was_stopped_with_its_pod_did_not_fail(
    metadata: Object, finished: str | None, reason: Reason
) -> None:
    grace = {"deletionGracePeriodSeconds": 600} if metadata else {}
    state = {"terminated": {"exitCode": 143, "finishedAt": finished}}
    pod = {
        "metadata": {"name": "job-1-worker-0", **metadata, **grace},
        "spec": {"nodeName": "n"},
        "status": {"phase": "Failed", "initContainerStatuses": [{"name": "init-pytorch", "state": state}]},
    }
    found = cause_of_pod(pod, memory_limit=None, over_at=None)
    assert found is not None
    assert found.reason is reason
