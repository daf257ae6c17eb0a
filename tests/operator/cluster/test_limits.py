"""What a job may not do, and what it may not wait for: in a namespace that enforces restricted Pod Security."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dpo_operator import clock
from dpo_testing.chaosproxy import ChaosProxy, Fault
from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import ApiError, eventually
from dpo_testing.operatorprocess import OperatorProcess


@pytest.fixture(scope="module")
def space(cluster: ControlPlane, kubelet: FakeKubelet) -> Iterator[str]:
    with cluster.namespace("limits", {"pod-security.kubernetes.io/enforce": "restricted"}) as name:
        yield name


@pytest.fixture(scope="module")
def jobs(cluster: ControlPlane, space: str) -> Iterator[Jobs]:
    with OperatorProcess(cluster.kubeconfig, "--scrape-by=off", namespaces=space) as process:
        yield Jobs(cluster.admin, space)
        assert process.exceptions() == []


def progressing(jobs: Jobs, name: str, reason: str, seconds: float = 40.0) -> str:
    """Wait until Progressing has this reason; return its message."""
    found = eventually(
        lambda: jobs.conditions(name).get("Progressing") or {},
        until=lambda condition: condition.get("reason") == reason,
        seconds=seconds,
        what=reason,
    )
    return str(found["message"])


def test_pods_pass_the_restricted_level_and_hold_no_token(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    jobs.create(manifest("strict", nodes=2))
    for name in ("strict-1-master-0", "strict-1-worker-0"):
        pod = kubelet.pod(space, name)
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert not [v for v in pod["spec"]["volumes"] if "projected" in v]
    jobs.wait_state("Running", name="strict")
    jobs.delete("strict")


def test_refused_pods_are_explained_by_their_only_event(jobs: Jobs) -> None:
    jobs.create(manifest("refused", podTemplate={"priorityClassName": "no-such-class"}))
    assert "no-such-class" in progressing(jobs, "refused", "PodsRefused")
    jobs.delete("refused")


def test_a_volume_that_cannot_be_mounted_is_explained_by_its_event(
    jobs: Jobs, kubelet: FakeKubelet, cluster: ControlPlane, space: str
) -> None:
    kubelet.hold(space)
    try:
        jobs.create(manifest("unmounted"))
        pod = eventually(lambda: jobs.pods().get("unmounted-1-master-0") or {}, what="the pod is there")
        kubelet.creating(space, "unmounted-1-master-0")
        words = 'MountVolume.SetUp failed for volume "spec" : configmap "unmounted-1-spec" not found'
        about = {"kind": "Pod", "name": pod["metadata"]["name"], "namespace": space, "uid": pod["metadata"]["uid"]}
        event = {
            "metadata": {"name": "unmounted.1"}, "involvedObject": about, "reason": "FailedMount", "message": words,
            "type": "Warning", "source": {"component": "kubelet"},
        }  # fmt: skip
        cluster.admin.create(("v1", "events"), space, event)
        assert words in progressing(jobs, "unmounted", "VolumeNotMounted")
        eventually(lambda: "VolumeNotMounted" in jobs.events("unmounted"), what="its event")
    finally:
        kubelet.release(space)
        jobs.delete("unmounted")


def test_a_start_that_takes_too_long_is_torn_down(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    kubelet.hold(space)
    try:
        jobs.create(manifest("slow", run_policy={"startTimeoutSeconds": 10, "maxRestarts": 0}))
        eventually(lambda: "slow-1-master-0" in jobs.pods(), what="the pod is there")
        kubelet.unschedulable(space, "slow-1-master-0", "0/4 nodes are available: 4 Insufficient cpu.")
        status = jobs.wait_state("Failed", name="slow")
        assert status["attempts"][0]["reason"] == "StartTimeout"
        assert "Insufficient cpu" in jobs.conditions("slow")["Failed"]["message"]
        eventually(lambda: "slow-1-master-0" not in jobs.pods(), what="no pod waits for nodes any more")
    finally:
        kubelet.release(space)


def test_the_deadline_counts_admitted_time(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    jobs.create(manifest("late", run_policy={"activeDeadlineSeconds": 2}))
    kubelet.pod(space, "late-1-master-0")
    jobs.wait_state("Failed", name="late")
    assert jobs.conditions("late")["Failed"]["reason"] == "DeadlineExceeded"
    eventually(lambda: "late-1-master-0" not in jobs.pods(), what="its pod is gone")


def test_the_deadline_does_not_count_what_is_suspended(jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    jobs.create(manifest("rested", run_policy={"activeDeadlineSeconds": 3, "suspend": True}))
    jobs.wait_state("Suspended", name="rested")
    created = clock.to_moment(jobs.get("rested")["metadata"]["creationTimestamp"])
    eventually(lambda: time.time() > created + 5, what="the deadline is over by the wall clock")
    jobs.patch("rested", {"runPolicy": {"suspend": False}})
    status = jobs.wait_state("Failed", name="rested")
    attempt = status["attempts"][0]
    assert attempt["reason"] == "DeadlineExceeded"
    lived = clock.to_moment(attempt["endTime"]) - clock.to_moment(attempt["startTime"])
    assert lived >= 3, "it had all of its time after the pause"
    assert status["admittedSeconds"] <= lived


def test_only_the_run_policy_may_be_changed(jobs: Jobs) -> None:
    jobs.create(manifest("fixed", run_policy={"suspend": True}))
    jobs.wait_state("Suspended", name="fixed")
    with pytest.raises(ApiError) as refused:
        jobs.patch("fixed", {"dpo": {"beta": 0.2}})
    assert refused.value.status == 422
    assert "runPolicy" in refused.value.message
    jobs.patch("fixed", {"runPolicy": {"maxRestarts": 7}})
    generation = jobs.get("fixed")["metadata"]["generation"]
    eventually(lambda: jobs.status("fixed").get("observedGeneration") == generation, what="the edit is observed")
    assert jobs.children().keys().isdisjoint({"fixed-1"})


def test_a_namespaces_memory_limit_is_the_containers_own(
    cluster: ControlPlane, kubelet: FakeKubelet, namespace: str
) -> None:
    """The job sets none; the LimitRange gives its container one, and more attempts would end alike."""
    jobs = Jobs(cluster.admin, namespace)
    limits = {"metadata": {"name": "all"}, "spec": {"limits": [{"type": "Container", "default": {"memory": "512Mi"}}]}}
    cluster.admin.create(("v1", "limitranges"), namespace, limits)
    with OperatorProcess(cluster.kubeconfig, "--scrape-by=off", namespaces=namespace) as operator:
        jobs.create(manifest("limited"))
        kubelet.finish(namespace, "limited-1-master-0", code=137, reason="OOMKilled")
        status = jobs.wait_state("Failed", name="limited")
        attempt = status["attempts"][0]
        assert (attempt["reason"], attempt["failureClass"]) == ("MemoryLimitExceeded", "permanent")
        assert "512Mi" in jobs.conditions("limited")["Failed"]["message"]
        assert operator.exceptions() == []


def test_a_job_continues_after_a_policy_is_relaxed(cluster: ControlPlane, kubelet: FakeKubelet, namespace: str) -> None:
    """The answer to what a ValidatingAdmissionPolicy denies is 422, as if the PyTorchJob were wrong for good."""
    kind, jobs = "admissionregistration.k8s.io/v1", Jobs(cluster.admin, namespace)
    rule = {
        "apiGroups": ["kubeflow.org"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pytorchjobs"]
    }  # fmt: skip
    policy = {
        "metadata": {"name": namespace},
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": "'team' in object.metadata.labels", "message": "give a team"}],
        },
    }
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    binding = {
        "metadata": {"name": namespace},
        "spec": {"policyName": namespace, "validationActions": ["Deny"], "matchResources": here},
    }
    made = [("validatingadmissionpolicies", policy), ("validatingadmissionpolicybindings", binding)]
    container = {"name": "pytorch", "image": "localhost/other:1"}
    replicas = {"Master": {"replicas": 1, "template": {"spec": {"containers": [container]}}}}
    probe = {
        "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "probe", "labels": {"a": "b"}},
        "spec": {"pytorchReplicaSpecs": replicas},
    }  # fmt: skip

    def denied() -> int:
        path = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"
        try:
            cluster.admin.call("POST", path, probe, dryRun="All")
        except ApiError as error:
            return error.status
        return 0

    try:
        for plural, body in made:
            cluster.admin.create((kind, plural), None, body)
        assert eventually(denied, what="the policy is in force") == 422
        flags = ("--scrape-by=off", "--resync-seconds=1")
        with OperatorProcess(cluster.kubeconfig, *flags, namespaces=namespace) as operator:
            jobs.create(manifest("teamless"))
            assert "give a team" in progressing(jobs, "teamless", "ChildRefused")
            assert "Accepted" not in jobs.conditions("teamless")
            cluster.admin.delete((kind, "validatingadmissionpolicybindings"), None, namespace)
            jobs.wait_child("teamless-1")
            kubelet.pod(namespace, "teamless-1-master-0")
            jobs.wait_state("Running", name="teamless")
            assert operator.exceptions() == []
    finally:
        for plural, _ in reversed(made):
            cluster.admin.delete((kind, plural), None, namespace)


def test_a_cluster_without_pytorchjob_is_waited_for(
    cluster: ControlPlane, kubelet: FakeKubelet, namespace: str
) -> None:
    jobs = Jobs(cluster.admin, namespace)
    with ChaosProxy(cluster.url, cluster.tls()) as proxy:
        proxy.rules[:] = [lambda call: Fault(status=404) if call.path.startswith("/apis/kubeflow.org") else None]
        kubeconfig = cluster.identity("admin", ["system:masters"], server=proxy.url)
        with OperatorProcess(kubeconfig, "--scrape-by=off", namespaces=namespace) as operator:
            assert operator.metric("dpo_operator_backend_installed") == 0
            jobs.create(manifest("early"))
            assert "PyTorchJob" in progressing(jobs, "early", "PyTorchJobMissing")
            proxy.rules.clear()
            jobs.wait_child("early-1")
            kubelet.pod(namespace, "early-1-master-0")
            jobs.wait_state("Running", name="early")
            assert operator.metric("dpo_operator_backend_installed") == 1
            assert operator.exceptions() == []
            assert operator.terminate() == 0
