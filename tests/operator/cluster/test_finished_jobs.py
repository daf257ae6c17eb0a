"""Jobs that are over, as an operator finds them after a restart: it keeps little of them, and serves them alike."""

from __future__ import annotations

from dpo_testing.chaosproxy import ChaosProxy
from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import DPOJOBS, eventually
from dpo_testing.operatorprocess import OperatorProcess


def test_a_job_that_is_over_costs_no_request_until_something_happens_to_it(
    cluster: ControlPlane, kubelet: FakeKubelet, namespace: str
) -> None:
    """Then the pass sees the whole object: an edit keeps the status, a retry goes on, and the time to live ends it."""
    jobs = Jobs(cluster.admin, namespace)
    with ChaosProxy(cluster.url, cluster.tls()) as proxy:
        kubeconfig = cluster.identity("admin", ["system:masters"], server=proxy.url)
        flags = ("--scrape-by=off", "--resync-seconds=1")
        with OperatorProcess(kubeconfig, *flags, namespaces=namespace) as operator:
            jobs.create(manifest("over", run_policy={"ttlSecondsAfterFinished": 3600, "maxRestarts": 0}))
            kubelet.finish(namespace, "over-1-master-0", last_words("InvalidData", message="row 3"), code=10)
            jobs.wait_state("Failed", name="over")
            operator.kill()
            operator.start()
            operator.wait_ready()

            asked = len(proxy.calls)
            passes = operator.passes()
            eventually(lambda: operator.passes() > passes + 3, what="some passes over it")
            assert [c for c in proxy.calls[asked:] if c.path.endswith("/over") or "over" in c.query] == []

            before = jobs.status("over")
            jobs.patch("over", {"runPolicy": {"attemptsHistoryLimit": 5}})
            generation = jobs.get("over")["metadata"]["generation"]
            status = eventually(
                lambda: jobs.status("over"),
                until=lambda s: s["observedGeneration"] == generation,
                what="the edit is seen",
            )
            assert status["attempts"] == before["attempts"]
            assert status["completionTime"] == before["completionTime"]

            annotations = {"metadata": {"annotations": {"dpo-operator.dev/retry": "1"}}}
            cluster.admin.patch(DPOJOBS, namespace, "over", annotations)
            kubelet.finish(namespace, "over-2-master-0", last_words("Succeeded", step=9, total=9))
            status = jobs.wait_state("Succeeded", name="over")
            assert status["attempts"][0] == before["attempts"][0]

            jobs.patch("over", {"runPolicy": {"ttlSecondsAfterFinished": 1}})
            eventually(lambda: cluster.admin.find(DPOJOBS, namespace, "over") is None, what="the DPOJob is deleted")
            assert operator.exceptions() == []
