"""DPOJobs in the queues of the real Kueue: admitted, preempted, suspended and restarted, and their states after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import Object, eventually
from dpo_testing.kueue import MANAGED, PRIORITY_LABEL, QUEUE_LABEL, Kueue, Queue
from dpo_testing.operatorprocess import OperatorProcess

DONE = last_words("Succeeded", step=4, total=4, runDir="s3://runs/job/", modelUri="s3://runs/job/model/")
ONE_JOB = 8
"""GPUs of each job here: a queue of as many runs one at a time."""


@pytest.fixture(scope="module")
def kueue(cluster: ControlPlane) -> Iterator[Kueue]:
    with Kueue(cluster) as running:
        running.priority("low", 100)
        running.priority("high", 1000)
        yield running


@pytest.fixture(scope="module")
def space(cluster: ControlPlane, kubelet: FakeKubelet, kueue: Kueue) -> Iterator[str]:
    with cluster.namespace("kueue", {MANAGED: "true"}) as name:
        yield name


@pytest.fixture(scope="module")
def operator(cluster: ControlPlane, space: str) -> Iterator[OperatorProcess]:
    with OperatorProcess(cluster.kubeconfig, "--scrape-by=off", namespaces=space) as process:
        yield process
        assert process.exceptions() == []


@pytest.fixture
def jobs(cluster: ControlPlane, space: str, operator: OperatorProcess) -> Jobs:
    return Jobs(cluster.admin, space)


def queued(name: str, queue: Queue, *, nodes: int = 1, **policy: object) -> Object:
    """Return a job of ONE_JOB GPUs that may not restart at its own expense."""
    policy = {"queueName": queue.name, "maxRestarts": 0, **policy}
    return manifest(name, run_policy=policy, resources={"nodes": nodes, "gpusPerNode": ONE_JOB // nodes})


def held(jobs: Jobs, child: str) -> bool:
    return bool(jobs.wait_child(child)["spec"]["runPolicy"].get("suspend"))


def test_a_job_waits_for_its_queue_and_runs_once_admitted(jobs: Jobs, kubelet: FakeKubelet, kueue: Kueue) -> None:
    queue = kueue.queue(jobs.namespace, gpus=ONE_JOB)
    jobs.create(queued("first", queue))
    jobs.wait_state("Running", name="first")
    # A label that a user puts on the DPOJob does what the fields do.
    second = queued("second", queue)
    del second["spec"]["runPolicy"]["queueName"]
    second["metadata"]["labels"] = {QUEUE_LABEL: queue.name, PRIORITY_LABEL: "low"}
    jobs.create(second)
    child = jobs.wait_child("second-1")
    assert child["metadata"]["labels"].items() >= second["metadata"]["labels"].items()
    workload = eventually(lambda: queue.workload("second-1"), what="Kueue makes a Workload")
    assert (workload["spec"]["queueName"], workload["spec"]["priority"]) == (queue.name, 100)
    status = jobs.wait_state("Queued", name="second")
    assert jobs.conditions("second")["Progressing"]["reason"] == "Queued"
    assert queue.name in jobs.conditions("second")["Progressing"]["message"]
    assert status["queue"] == queue.name, "the column QUEUE, whichever way the queue was named"
    assert held(jobs, "second-1")
    assert "second-1-master-0" not in jobs.pods()
    assert (status.get("admittedSince"), status.get("admittedSeconds") or 0) == (None, 0), "queued time counts not"

    kubelet.finish(jobs.namespace, "first-1-master-0", DONE)
    jobs.wait_state("Succeeded", name="first")
    jobs.wait_state("Running", name="second")
    assert "Admitted" in queue.conditions("second-1")
    kubelet.finish(jobs.namespace, "second-1-master-0", DONE)
    jobs.wait_state("Succeeded", name="second")
    eventually(lambda: "Finished" in queue.conditions("second-1"), what="Kueue sees the end too")


def test_a_preempted_job_continues_in_the_same_attempt(jobs: Jobs, kubelet: FakeKubelet, kueue: Kueue) -> None:
    queue = kueue.queue(jobs.namespace, gpus=ONE_JOB, preempt=True)
    jobs.create(queued("cheap", queue, priorityClass="low"))
    jobs.wait_state("Running", name="cheap")
    jobs.create(queued("dear", queue, priorityClass="high"))
    jobs.wait_state("Queued", name="cheap")
    jobs.wait_state("Running", name="dear")
    assert "Preempted" in queue.conditions("cheap-1")
    assert jobs.status("cheap").get("admittedSince") is None, "its deadline is not counted"
    eventually(lambda: "cheap-1-master-0" not in jobs.pods(), what="its pod has ended")

    kubelet.finish(jobs.namespace, "dear-1-master-0", DONE)
    jobs.wait_state("Running", name="cheap")
    kubelet.finish(jobs.namespace, "cheap-1-master-0", DONE)
    status = jobs.wait_state("Succeeded", name="cheap")
    assert (status["restarts"], [a["child"] for a in status["attempts"]]) == (0, ["cheap-1"])


def test_readmission_within_the_grace_period_costs_an_uncharged_attempt(
    jobs: Jobs, kubelet: FakeKubelet, kueue: Kueue
) -> None:
    """training-operator takes pods that still write their checkpoint for failed ones."""
    queue = kueue.queue(jobs.namespace, gpus=ONE_JOB, preempt=True)
    jobs.create(queued("slow", queue, priorityClass="low"))
    jobs.wait_state("Running", name="slow")
    old = jobs.pods()["slow-1-master-0"]["metadata"]["uid"]
    kubelet.keep_terminating(jobs.namespace)
    try:
        jobs.create(queued("short", queue, priorityClass="high"))
        jobs.wait_state("Queued", name="slow")
        jobs.wait_state("Running", name="short")
        kubelet.finish(jobs.namespace, "short-1-master-0", DONE)
        jobs.wait_state("Succeeded", name="short")
        said = eventually(
            lambda: jobs.status("slow"), until=lambda s: s["attempts"][0].get("result") == "Failed", what="it failed"
        )
        assert said["attempts"][0]["failureClass"] == "infrastructure"
        # The next attempt waits for the last pod of this one, which still holds its node and its checkpoint.
        eventually(
            lambda: jobs.conditions("slow")["Progressing"]["message"],
            until=lambda message: message.endswith("Waiting for its last pods to terminate."),
            what="it waits for the old pod",
        )
        assert jobs.pods()["slow-1-master-0"]["metadata"]["uid"] == old
        assert "slow-2" not in jobs.children()
    finally:
        kubelet.finish_terminating(jobs.namespace)
    jobs.wait_child("slow-2")
    jobs.wait_state("Running", name="slow")
    kubelet.finish(jobs.namespace, "slow-2-master-0", DONE)
    status = jobs.wait_state("Succeeded", name="slow")
    assert (status["restarts"], status["chargedRestarts"]) == (1, 0)


@pytest.mark.nightly  # tests/operator/unit/test_life.py has the queue of each attempt
def test_a_restart_queues_again_by_its_own_priority(jobs: Jobs, kubelet: FakeKubelet, kueue: Kueue) -> None:
    queue = kueue.queue(jobs.namespace, gpus=ONE_JOB)
    jobs.create(queued("flaky", queue, nodes=2, maxRestarts=1, priorityClass="low", restartPriorityClass="high"))
    jobs.wait_state("Running", name="flaky")
    assert queue.workload("flaky-1")["spec"]["priority"] == 100
    jobs.create(queued("waiting", queue, priorityClass="low"))
    jobs.wait_state("Queued", name="waiting")

    # Its quota is free as soon as it has failed; its restart has to wait for the worker too.
    kubelet.keep_terminating(jobs.namespace)
    try:
        words = last_words("StorageUnavailable", message="s3://prefs did not answer")
        kubelet.finish(jobs.namespace, "flaky-1-master-0", words, 74)
        jobs.wait_state("Running", name="waiting")
        assert "flaky-2" not in jobs.children()
    finally:
        kubelet.finish_terminating(jobs.namespace)
    jobs.wait_child("flaky-2")
    jobs.wait_state("Queued", name="flaky")
    workload = eventually(lambda: queue.workload("flaky-2"), what="the restart has a Workload of its own")
    assert workload["spec"]["priority"] == 1000
    # Jobs that were admitted before it keep their place; jobs that only wait, however long, are overtaken.
    jobs.create(queued("later", queue, priorityClass="low"))
    jobs.wait_state("Queued", name="later")
    kubelet.finish(jobs.namespace, "waiting-1-master-0", DONE)
    jobs.wait_state("Running", name="flaky")
    assert jobs.status("later")["state"] == "Queued"
    assert held(jobs, "later-1")
    kubelet.finish(jobs.namespace, "flaky-2-master-0", DONE)
    jobs.wait_state("Running", name="later")
    assert jobs.wait_state("Succeeded", name="flaky")["chargedRestarts"] == 1
    kubelet.finish(jobs.namespace, "later-1-master-0", DONE)
    jobs.wait_state("Succeeded", name="later")


def test_suspended_while_admitted_it_gives_its_place_away(jobs: Jobs, kubelet: FakeKubelet, kueue: Kueue) -> None:
    queue = kueue.queue(jobs.namespace, gpus=ONE_JOB)
    jobs.create(queued("paused", queue))
    jobs.wait_state("Running", name="paused")
    jobs.create(queued("next", queue))
    jobs.wait_state("Queued", name="next")

    jobs.patch("paused", {"runPolicy": {"suspend": True}})
    jobs.wait_state("Suspended", name="paused")
    assert "paused-1" not in jobs.children()
    # The Workload goes with its owner; a garbage collector that has just met the kind takes up to 30 s to do so.
    jobs.wait_state("Running", name="next", seconds=90)

    jobs.patch("paused", {"runPolicy": {"suspend": False}})
    jobs.wait_state("Queued", name="paused")
    assert held(jobs, "paused-2")
    assert jobs.status("next")["state"] == "Running", "it does not take its place back"
    kubelet.finish(jobs.namespace, "next-1-master-0", DONE)
    jobs.wait_state("Running", name="paused")
    kubelet.finish(jobs.namespace, "paused-2-master-0", DONE)
    assert jobs.wait_state("Succeeded", name="paused")["chargedRestarts"] == 0
