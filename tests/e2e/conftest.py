"""The real cluster of this machine, with our chart, the quickstart's data and a namespace that trusts nobody."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_testing.jobs import Jobs
from dpo_testing.realcluster import cluster as real
from dpo_testing.realcluster import machine, objectstore, release, smallworld, trainingoperator, watching
from dpo_testing.realcluster.layout import Layout
from dpo_testing.realcluster.steps import Steps

NAMESPACE = "alignment"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e/" in item.path.as_posix():
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(900))
            item.add_marker(pytest.mark.xdist_group("e2e"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[real.Cluster]:
    given = os.environ.get("E2E_KUBECONFIG")
    if given:
        with real.existing(Path(given)) as found:
            yield found
        return
    layout = Layout.default()
    up = real.attached(layout)
    if up is None and (why := machine.unsuitable(layout)) is not None:
        pytest.skip(f"no real cluster here: {why}")
    yield up or real.up(layout)


@pytest.fixture(scope="session")
def nothing_before(cluster: real.Cluster) -> None:
    """Takes away what an earlier story left in a cluster that stayed up."""
    if not cluster.api.find(("v1", "namespaces"), None, release.NAMESPACE):
        return
    with cluster.steps.step("an earlier story is taken away"):
        cluster.kubectl("-n", NAMESPACE, "delete", "dpojobs,pytorchjobs", "--all", "--wait", check=False)
        cluster.helm("uninstall", release.NAME, "--namespace", release.NAMESPACE, "--wait", check=False)
        cluster.kubectl("delete", "namespace", NAMESPACE, release.NAMESPACE, "--wait", check=False)
        if cluster.given is None:
            trainingoperator.restart(cluster)
    objectstore.empty(cluster.layout, watching.BUCKET, "runs/")


@pytest.fixture(scope="session")
def steps(cluster: real.Cluster) -> Iterator[Steps]:
    yield cluster.steps
    print("\n" + cluster.steps.table())


@pytest.fixture(scope="session")
def jobs(cluster: real.Cluster) -> Jobs:
    """The namespace of the jobs; model and data lie in the bucket."""
    with cluster.steps.step("base model and data into the bucket"):
        smallworld.upload(smallworld.make(cluster.layout), objectstore.server(cluster.layout))
    return watching.namespace(cluster, NAMESPACE)
