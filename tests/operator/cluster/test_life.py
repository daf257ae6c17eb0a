"""A DPOJob's life on a real control plane: what is created, what is said, and what ends it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest

from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.faketrainer import FakeTrainer
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import CONFIGMAPS, PODS, ApiError, eventually
from dpo_testing.operatorprocess import OperatorProcess

DONE = last_words("Succeeded", step=64, total=64, metrics={"val/acc": 0.75, "train/loss": 0.5},
                  runDir="s3://runs/job/", modelUri="s3://runs/job/model/")  # fmt: skip


@pytest.fixture(scope="module")
def space(cluster: ControlPlane, kubelet: FakeKubelet) -> Iterator[str]:
    with cluster.namespace("life") as name:
        yield name


@pytest.fixture(scope="module")
def operator(cluster: ControlPlane, space: str) -> Iterator[OperatorProcess]:
    with OperatorProcess(cluster.kubeconfig, "--scrape-by=pod-ip", namespaces=space) as process:
        yield process
        assert process.exceptions() == []


@pytest.fixture
def jobs(cluster: ControlPlane, space: str, operator: OperatorProcess) -> Jobs:
    return Jobs(cluster.admin, space)


def test_a_job_runs_to_its_end(jobs: Jobs, kubelet: FakeKubelet, cluster: ControlPlane, space: str) -> None:
    jobs.create(manifest("whole", nodes=2))
    jobs.wait_child("whole-1")
    rank0 = kubelet.pod(space, "whole-1-master-0")
    kubelet.pod(space, "whole-1-worker-0")
    jobs.wait_state("Running", name="whole")

    with FakeTrainer.of(rank0) as trainer:
        trainer.say(step=12, total=64, epoch=0.2, etaSeconds=90,
                    metrics={"train/acc": 0.625, "train/loss": 0.61, "train/rewards_margin": 0.25})  # fmt: skip
        status = eventually(
            lambda: jobs.status("whole"), until=lambda s: (s.get("progress") or {}).get("step") == 12, what="step 12"
        )
        assert status["summary"] == {**status["summary"], "step": "12/64", "loss": "0.6100"}
        row = cluster.kubectl("get", "dpo", "whole", "-n", space, "--no-headers").stdout.split()
        assert row[:4] == ["whole", "Running", "12/64", "0.62"] or row[:4] == ["whole", "Running", "12/64", "0.63"]
        assert row[4:7] == ["0.25", "0", "2"]

    kubelet.finish(space, "whole-1-master-0", DONE)
    cluster.kubectl("wait", "--for=condition=Succeeded", "dpo/whole", "-n", space, "--timeout=30s")
    status = jobs.status("whole")
    assert status["state"] == "Succeeded"
    assert status["modelURI"] == "s3://runs/job/model/"
    assert status["finalMetrics"]["val/acc"] == 0.75
    assert [(a["number"], a["result"]) for a in status["attempts"]] == [(1, "Succeeded")]
    conditions = jobs.conditions("whole")
    assert {kind: conditions[kind]["status"] for kind in ("Accepted", "Finished", "Succeeded", "Failed")} == {
        "Accepted": "True", "Finished": "True", "Succeeded": "True", "Failed": "False",
    }  # fmt: skip
    assert set(jobs.events("whole")) >= {"Accepted", "PyTorchJobCreated", "TrainingStarted", "Succeeded"}
    # What was true before an edit is true after it, and kubectl sees that.
    jobs.patch("whole", {"runPolicy": {"ttlSecondsAfterFinished": 3600}})
    for kind in ("Accepted", "Succeeded"):
        cluster.kubectl("wait", f"--for=condition={kind}", "dpo/whole", "-n", space, "--timeout=30s")
    # The workers end with the master: cleanPodPolicy Running.
    eventually(lambda: "whole-1-worker-0" not in jobs.pods(), what="the worker is cleaned up")
    owner = jobs.children()["whole-1"]["metadata"]["ownerReferences"][0]
    assert owner["uid"] == jobs.get("whole")["metadata"]["uid"]
    # kopf must leave no trace, or deletion would wait for the operator.
    metadata = jobs.get("whole")["metadata"]
    assert "finalizers" not in metadata
    assert not [key for key in metadata.get("annotations", {}) if "kopf" in key or "dpo-operator.dev" in key]


def test_a_single_node_job_has_no_worker(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    jobs.create(manifest("single"))
    child = jobs.wait_child("single-1")
    assert set(child["spec"]["pytorchReplicaSpecs"]) == {"Master"}
    kubelet.finish(space, "single-1-master-0", DONE)
    jobs.wait_state("Succeeded", name="single")


def test_a_permanent_failure_burns_no_second_attempt(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    jobs.create(manifest("bad-data"))
    jobs.wait_child("bad-data-1")
    kubelet.finish(space, "bad-data-1-master-0", last_words("InvalidData", message="s3://prefs/a line 3: no answer"), 3)
    status = jobs.wait_state("Failed", name="bad-data")
    assert status["attempts"][0]["reason"] == "InvalidData"
    assert status["attempts"][0]["failureClass"] == "permanent"
    assert "line 3" in jobs.conditions("bad-data")["Failed"]["message"]
    assert "bad-data-2" not in jobs.children()


def test_a_retryable_failure_is_charged_and_repeated_until_the_budget_is_used_up(
    jobs: Jobs, kubelet: FakeKubelet, space: str
) -> None:
    jobs.create(manifest("flaky", run_policy={"maxRestarts": 1}))
    words = last_words("StorageUnavailable", message="s3://prefs did not answer")
    first = kubelet.pod(space, "flaky-1-master-0")
    kubelet.exit(first, 74, words)
    jobs.wait_child("flaky-2")
    status = jobs.wait_state("Starting", "Running", name="flaky")
    assert (status["restarts"], status["chargedRestarts"]) == (1, 1)
    kubelet.finish(space, "flaky-2-master-0", words, 74)
    status = jobs.wait_state("Failed", name="flaky")
    assert jobs.conditions("flaky")["Failed"]["reason"] == "RestartsExhausted"
    assert [a["pods"][0]["name"] for a in status["attempts"]] == ["flaky-1-master-0", "flaky-2-master-0"]
    assert "flaky-3" not in jobs.children()


def test_an_eviction_is_charged_to_no_budget(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    jobs.create(manifest("drained", nodes=2, run_policy={"maxRestarts": 0}))
    jobs.wait_child("drained-1")
    kubelet.pod(space, "drained-1-master-0")
    node = kubelet.pod(space, "drained-1-worker-0")["spec"]["nodeName"]
    kubelet.evict(space, "drained-1-worker-0")
    second = jobs.wait_child("drained-2")
    affinity = second["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["affinity"]["nodeAffinity"]
    assert node in str(affinity["preferredDuringSchedulingIgnoredDuringExecution"])
    status = jobs.wait_state("Starting", "Running", name="drained")
    assert status["chargedRestarts"] == 0
    first = status["attempts"][0]
    assert (first["reason"], first["failureClass"]) == ("Drained", "infrastructure")
    kubelet.finish(space, "drained-2-master-0", DONE)
    jobs.wait_state("Succeeded", name="drained")


def test_suspend_releases_the_nodes_and_resume_continues(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    jobs.create(manifest("paused", run_policy={"maxRestarts": 0}))
    kubelet.pod(space, "paused-1-master-0")
    jobs.wait_state("Running", name="paused")
    jobs.patch("paused", {"runPolicy": {"suspend": True}})
    status = jobs.wait_state("Suspended", name="paused")
    assert jobs.conditions("paused")["Suspended"]["status"] == "True"
    eventually(lambda: not any(name.startswith("paused-") for name in jobs.pods()), what="no pod is left")
    jobs.patch("paused", {"runPolicy": {"suspend": False}})
    jobs.wait_child("paused-2")
    kubelet.finish(space, "paused-2-master-0", DONE)
    status = jobs.wait_state("Succeeded", name="paused")
    assert status["chargedRestarts"] == 0
    assert jobs.conditions("paused")["Suspended"]["status"] == "False"


def test_an_impossible_spec_is_rejected_with_field_and_fix(jobs: Jobs) -> None:
    jobs.create(manifest("impossible", data={"train": [{"uri": "/data/train.jsonl"}]}))
    jobs.wait_state("Rejected", name="impossible")
    accepted = jobs.conditions("impossible")["Accepted"]
    assert accepted["status"] == "False"
    assert "spec.data.train[0].uri" in accepted["message"]
    assert not [name for name in jobs.children() if name.startswith("impossible")]


def test_a_wrong_manifest_is_edited_and_runs(
    jobs: Jobs, kubelet: FakeKubelet, cluster: ControlPlane, space: str
) -> None:
    """The mistake is one that no rule of the CRD finds: the address is in no volume of the pods."""

    def apply(**sections: object) -> str:
        text = json.dumps(manifest("typo", run_policy={"ttlSecondsAfterFinished": 600}, **sections))
        return cluster.kubectl("apply", "-n", space, "-f", "-", stdin=text).stdout

    def conditions() -> dict[str, str]:
        return {kind: condition["status"] for kind, condition in jobs.conditions("typo").items()}

    assert "created" in apply(data={"train": [{"uri": "/data/train.jsonl"}]})
    cluster.kubectl("wait", "--for=condition=Finished", "dpo/typo", "-n", space, "--timeout=40s")
    assert conditions() == {
        "Accepted": "False", "Progressing": "False", "Finished": "True", "Succeeded": "False", "Failed": "True",
        "Stalled": "True",
    }  # fmt: skip
    assert jobs.status("typo")["completionTime"]
    assert "configured" in apply(data={"train": [{"uri": "s3://prefs/train.jsonl"}]}, dpo={"beta": 0.3})
    child = jobs.wait_child("typo-1")
    kubelet.pod(space, "typo-1-master-0")
    status = jobs.wait_state("Running", name="typo")
    assert conditions() == {"Accepted": "True", "Progressing": "True"}
    assert "completionTime" not in status
    volumes = child["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["volumes"]
    assert {"name": status["configMap"]}.items() <= next(v for v in volumes if v["name"] == "spec")["configMap"].items()
    pinned = cluster.admin.get(CONFIGMAPS, space, status["configMap"])["data"]["spec.json"]
    assert json.loads(pinned)["spec"]["dpo"] == {"beta": 0.3}
    assert status["acceptedSpecDigest"] == f"sha256:{hashlib.sha256(pinned.encode()).hexdigest()}"
    with pytest.raises(ApiError, match="dpo cannot be changed after acceptance"):
        jobs.patch("typo", {"dpo": {"beta": 0.4}})
    kubelet.finish(space, "typo-1-master-0", DONE)
    cluster.kubectl("wait", "--for=condition=Finished", "dpo/typo", "-n", space, "--timeout=40s")
    assert conditions() == {
        "Accepted": "True", "Progressing": "False", "Finished": "True", "Succeeded": "True", "Failed": "False",
    }  # fmt: skip


def test_pods_that_wait_are_explained_in_their_own_words(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    kubelet.hold(space)
    try:
        jobs.create(manifest("waits"))
        eventually(lambda: "waits-1-master-0" in jobs.pods(), what="the pod is there")
        words = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
        kubelet.unschedulable(space, "waits-1-master-0", words)

        def progressing() -> dict[str, str]:
            return jobs.conditions("waits").get("Progressing") or {}

        said = eventually(progressing, until=lambda c: c.get("reason") == "Unschedulable", what="Unschedulable")
        assert "Insufficient nvidia.com/gpu" in said["message"]
        kubelet.waiting(space, "waits-1-master-0", "ImagePullBackOff", "Back-off pulling image localhost/trainer:1")
        said = eventually(progressing, until=lambda c: c.get("reason") == "ImagePullFailed", what="ImagePullFailed")
        assert "localhost/trainer:1" in said["message"]
    finally:
        kubelet.release(space)
        jobs.delete("waits")


def test_a_finished_job_goes_when_its_time_is_up(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    jobs.create(manifest("short-lived", run_policy={"ttlSecondsAfterFinished": 1}))
    kubelet.finish(space, "short-lived-1-master-0", DONE)
    eventually(lambda: jobs.api.find(("dpo-operator.dev/v1alpha1", "dpojobs"), space, "short-lived") is None,
               what="the DPOJob is deleted")  # fmt: skip
    eventually(lambda: "short-lived-1" not in jobs.children(), what="its child is collected")


def test_a_trainer_that_does_not_answer_restarts_nothing(
    jobs: Jobs, kubelet: FakeKubelet, space: str, operator: OperatorProcess
) -> None:
    jobs.create(manifest("silent"))
    rank0 = kubelet.pod(space, "silent-1-master-0")
    with FakeTrainer.of(rank0) as trainer:
        trainer.say(step=1, total=2)
        eventually(lambda: jobs.conditions("silent").get("ProgressAvailable"), what="it answers")
        for status, body, headers in (
            (500, b"{}", {}),
            (302, b"", {"Location": f"http://127.0.0.1:{operator.port}/metrics"}),
            (200, b'{"phase": "train", "step": "no number"}', {}),
            (200, b" " * 200_000, {}),
        ):
            trainer.status, trainer.body, trainer.headers = status, body, headers
            asked = trainer.asked
            eventually(lambda n=asked: trainer.asked >= n + 2, what=f"two questions at {status}")  # type: ignore[misc]
            eventually(
                lambda: jobs.conditions("silent")["ProgressAvailable"],
                until=lambda condition: condition["status"] == "False",
                what=f"ProgressAvailable is False after {status}",
            )
        assert jobs.status("silent")["state"] == "Running"
        trainer.status, trainer.headers = 200, {}
        trainer.say(step=1, total=2)
        eventually(lambda: jobs.conditions("silent")["ProgressAvailable"]["status"] == "True", what="it answers")
    assert jobs.status("silent")["restarts"] == 0
    jobs.delete("silent")


def test_a_pytorchjob_of_another_owner_is_neither_adopted_nor_changed(
    jobs: Jobs, kubelet: FakeKubelet, space: str, cluster: ControlPlane
) -> None:
    """A PyTorchJob of the child's name that somebody else made is neither adopted nor touched."""
    stranger = {
        "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "taken-1"},
        "spec": {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": {
            "spec": {"containers": [{"name": "pytorch", "image": "localhost/other:1"}]}}}}},
    }  # fmt: skip
    made = cluster.admin.create(("kubeflow.org/v1", "pytorchjobs"), space, stranger)
    jobs.create(manifest("taken"))
    said = eventually(
        lambda: jobs.conditions("taken").get("Progressing") or {},
        until=lambda c: c.get("reason") == "ChildNameTaken",
        what="ChildNameTaken",
    )
    assert "taken-1" in said["message"]
    assert jobs.children()["taken-1"]["metadata"]["uid"] == made["metadata"]["uid"]
    assert cluster.admin.list(PODS, space, labelSelector="dpo-operator.dev/job=taken") == []
    # Once the name is free the job has its own.
    cluster.admin.delete(("kubeflow.org/v1", "pytorchjobs"), space, "taken-1")
    kubelet.finish(space, "taken-1-master-0", DONE)
    jobs.wait_state("Succeeded", name="taken")
    assert jobs.children()["taken-1"]["metadata"]["uid"] != made["metadata"]["uid"]
