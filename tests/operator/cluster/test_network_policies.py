"""The NetworkPolicy of a job on a real API server: created once, owned, and deleted with the job."""

from __future__ import annotations

from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import NETWORK_POLICIES, Object, eventually
from dpo_testing.networkpolicies import Peer, allows
from dpo_testing.operatorprocess import OperatorProcess

FLAGS = (
    "--operator-namespace=dpo-system",
    "--operator-labels=app.kubernetes.io/component=operator",
    '--metrics-from=[{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]',
)


def test_a_job_that_runs_gets_one_policy_after_an_upgrade_and_keeps_it(
    cluster: ControlPlane, kubelet: FakeKubelet, namespace: str, jobs: Jobs
) -> None:
    def policies() -> list[Object]:
        return cluster.admin.list(NETWORK_POLICIES, namespace)

    with OperatorProcess(cluster.kubeconfig, "--network-policies=off", namespaces=namespace) as former:
        jobs.create(manifest("job", nodes=2))
        kubelet.pod(namespace, "job-1-master-0")
        jobs.wait_state("Running")
        assert policies() == []
        assert former.exceptions() == []
    with OperatorProcess(cluster.kubeconfig, *FLAGS, namespaces=namespace) as operator:
        name = eventually(lambda: jobs.status().get("networkPolicy"), what="the policy is in the status")
        (policy,) = policies()
        assert policy["metadata"]["name"] == name
        (owner,) = policy["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("DPOJob", jobs.get()["metadata"]["uid"])
        assert jobs.status()["state"] == "Running"
        # The next attempt finds it there.
        kubelet.finish(namespace, "job-1-worker-0", last_words("Communication", message="lost a peer"), 75)
        jobs.wait_child("job-2")
        assert [p["metadata"]["uid"] for p in policies()] == [policy["metadata"]["uid"]]
        pods = {pod: thing["metadata"]["labels"] for pod, thing in jobs.pods().items()}
        assert operator.exceptions() == []
    rank0 = eventually(lambda: kubelet.pod(namespace, "job-2-master-0"))["metadata"]["labels"]
    for own in (*pods.values(), rank0):
        assert allows([policy], namespace, own, Peer(namespace, rank0), 23456)
        assert allows([policy], namespace, own, Peer("monitoring", {}), 9400)
        assert allows([policy], namespace, own, Peer("dpo-system", {"app.kubernetes.io/component": "operator"}), 9400)
        assert not allows([policy], namespace, own, Peer("monitoring", {}), 23456)
        assert not allows([policy], namespace, own, Peer(namespace, {"dpo-operator.dev/job": "job"}), 9400)
    jobs.delete()
    eventually(lambda: policies() == [], what="the policy is deleted with its job")
