"""One control plane a test process, one operator a module, one namespace a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet
from dpo_testing.jobs import Jobs
from dpo_testing.operatorprocess import OperatorProcess


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/operator/cluster/" in item.path.as_posix():
            item.add_marker(pytest.mark.cluster)
            # The cluster is expensive: all of these run in the process that has it.
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[ControlPlane]:
    plane = ControlPlane()
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


@pytest.fixture(scope="session")
def kubelet(cluster: ControlPlane) -> Iterator[FakeKubelet]:
    player = FakeKubelet(cluster.admin, nodes=4)
    player.start()
    try:
        yield player
    finally:
        player.stop()


@pytest.fixture
def namespace(cluster: ControlPlane, kubelet: FakeKubelet) -> Iterator[str]:
    with cluster.namespace() as name:
        yield name


@pytest.fixture
def jobs(cluster: ControlPlane, namespace: str) -> Jobs:
    return Jobs(cluster.admin, namespace)


@pytest.fixture
def operator(cluster: ControlPlane, namespace: str) -> Iterator[OperatorProcess]:
    """An operator for this test's namespace alone, so that tests do not meet each other's."""
    with OperatorProcess(cluster.kubeconfig, namespaces=namespace) as process:
        yield process
        assert process.exceptions() == []
