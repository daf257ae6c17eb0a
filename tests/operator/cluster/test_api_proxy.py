"""Progress out of the cluster: the question goes through the API server, which connects to the pod by itself."""

import socket
from collections.abc import Iterator

import pytest

from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet
from dpo_testing.faketrainer import FakeTrainer, fence_of
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import PODS, Object, eventually
from dpo_testing.operatorprocess import OperatorProcess


@pytest.fixture(scope="module")
def address() -> str:
    """An address of this machine that a pod may have: the API server forwards nothing to loopback addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it asks for the route alone
            found = str(probe.getsockname()[0])
        except OSError:
            found = "127.0.0.1"
    if found.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return found


@pytest.fixture
def outside(cluster: ControlPlane, namespace: str) -> Iterator[OperatorProcess]:
    """An operator with a kubeconfig and nothing said of the way: it is not in the cluster."""
    with OperatorProcess(cluster.kubeconfig, namespaces=namespace) as process:
        yield process
        assert process.exceptions() == []


def move(cluster: ControlPlane, pod: Object, address: str) -> None:
    status = {"status": {"podIP": address, "podIPs": [{"ip": address}]}}
    cluster.admin.patch(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], status, sub="status")


def test_progress_comes_through_the_api_server(
    cluster: ControlPlane, kubelet: FakeKubelet, jobs: Jobs, namespace: str, address: str, outside: OperatorProcess
) -> None:
    jobs.create(manifest("far"))
    pod = kubelet.pod(namespace, "far-1-master-0")
    with FakeTrainer(address, attempt=fence_of(pod)) as trainer:
        trainer.say(step=21, total=80, metrics={"train/loss": 0.5})
        move(cluster, pod, address)
        status = eventually(
            lambda: jobs.status("far"), until=lambda s: (s.get("progress") or {}).get("step") == 21, what="step 21"
        )
        assert status["summary"]["step"] == "21/80"
        assert jobs.conditions("far")["ProgressAvailable"]["status"] == "True"
        # What the API server refuses to forward, and what a pod answers wrongly, is news about the connection alone.
        for wrong in ((302, {"Location": f"http://{address}:{outside.port}/metrics"}), (500, {})):
            trainer.status, trainer.headers = wrong
            asked = trainer.asked
            eventually(lambda asked=asked: trainer.asked > asked + 1, what="it is asked again")  # type: ignore[misc]
            eventually(
                lambda: jobs.conditions("far")["ProgressAvailable"]["status"] == "False", what="the silence is said"
            )
            assert jobs.status("far")["progress"]["step"] == 21
            trainer.status, trainer.headers = 200, {}
            eventually(lambda: jobs.conditions("far")["ProgressAvailable"]["status"] == "True", what="it answers again")
    eventually(lambda: jobs.conditions("far")["ProgressAvailable"]["status"] == "False", what="nobody answers")
    assert (jobs.status("far")["state"], jobs.status("far").get("restarts") or 0) == ("Running", 0)
