"""One control plane a group of modules, one operator a module or test, one namespace a test.

These tests mostly wait: for leases that run out, for back-offs, for pods to end. Two groups, each with a control plane
of its own, wait at the same time. A new module goes to the group that takes less time.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet
from dpo_testing.jobs import Jobs
from dpo_testing.operatorprocess import OperatorProcess

SECOND = ("test_chaos", "test_clock_and_zombie", "test_dpo_command", "test_kueue", "test_limits", "test_node_lost")
"""The modules of the second group; all others make the first."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/operator/cluster/" in item.path.as_posix():
            item.add_marker(pytest.mark.cluster)
            # A control plane is expensive: all tests of a group run in the process that has it.
            item.add_marker(pytest.mark.xdist_group(f"cluster-{2 if item.path.stem in SECOND else 1}"))


@pytest.fixture(scope="package")  # ends with the group's last test: an idle control plane takes a quarter of a core
def cluster() -> Iterator[ControlPlane]:
    plane = ControlPlane()
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


@pytest.fixture(scope="package")
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
