"""A node stops: its lease ends, the real controllers taint it and evict its pods, and the job goes on elsewhere."""

from __future__ import annotations

import pytest

from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import NODES, FakeKubelet, last_words
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import eventually
from dpo_testing.operatorprocess import OperatorProcess

DONE = last_words("Succeeded", step=4, total=4, runDir="s3://runs/job/", modelUri="s3://runs/job/model/")


@pytest.mark.nightly  # it waits for a minute; tests/operator/unit has the decision
def test_a_lost_node_costs_one_uncharged_attempt(cluster: ControlPlane, kubelet: FakeKubelet, namespace: str) -> None:
    jobs = Jobs(cluster.admin, namespace)
    # The shipped toleration is 30 s; a shorter one only shortens the test.
    with OperatorProcess(
        cluster.kubeconfig, "--scrape-by=off", "--node-failure-toleration-seconds=1", namespaces=namespace
    ) as operator:
        # A job that endures every taint, as on tainted GPU nodes, must not stay on a dead one for ever.
        endures = {"tolerations": [{"operator": "Exists"}]}
        jobs.create(manifest("lost", nodes=2, run_policy={"maxRestarts": 0}, podTemplate=endures))
        jobs.wait_child("lost-1")
        kubelet.pod(namespace, "lost-1-master-0")
        worker = kubelet.pod(namespace, "lost-1-worker-0")
        jobs.wait_state("Running", name="lost")
        node = worker["spec"]["nodeName"]
        kubelet.lose_node(node)

        def target() -> dict[str, str]:
            pod = jobs.pods().get("lost-1-worker-0", {})
            conditions = pod.get("status", {}).get("conditions", [])
            return next((c for c in conditions if c["type"] == "DisruptionTarget"), {})

        condition = eventually(target, seconds=60, what="the taint manager evicts the pod")
        assert condition["reason"] == "DeletionByTaintManager"
        # A cloud's controller removes a node that is gone for good; its pods go with it.
        cluster.admin.delete(NODES, None, node)
        second = jobs.wait_child("lost-2", seconds=90)
        affinity = second["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["affinity"]["nodeAffinity"]
        assert node in str(affinity["preferredDuringSchedulingIgnoredDuringExecution"]), "the next one prefers others"
        status = jobs.status("lost")
        assert (status["attempts"][0]["reason"], status["chargedRestarts"]) == ("NodeLost", 0)
        assert node in status["attempts"][0]["message"]
        assert any(pod.get("node") == node for pod in status["attempts"][0]["pods"])
        assert "Restarting" in jobs.events("lost")
        kubelet.finish(namespace, "lost-2-master-0", DONE)
        jobs.wait_state("Succeeded", name="lost")
        assert operator.exceptions() == []
    kubelet.add_node(f"{node}-new")
