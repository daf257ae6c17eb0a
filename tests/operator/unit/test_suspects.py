"""The nodes that the next attempt avoids after peers lost contact with each other."""

from __future__ import annotations

import pytest

from dpo_api.errors import Outcome
from dpo_testing.simcluster import SimCluster, avoided, manifest

ALL = ("master-0", "worker-0", "worker-1", "worker-2")


def lost_contact(cluster: SimCluster, reporters: list[str], *, stopped: tuple[str, ...] = ()) -> list[str]:
    """Let pods report lost contact and the others vanish; return the nodes that the next attempt's pods avoid."""
    for name in reporters:
        cluster.end_pod(f"job-1-{name}", Outcome.Communication, message="lost contact with another process")
    cluster.settle()
    for name in stopped:
        cluster.end_pod(f"job-1-{name}", Outcome.Stopped, message="asked to stop")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "Communication"
    cluster.sleep_out()
    return avoided(cluster.children["job-2"])


@pytest.mark.parametrize(
    ("reporters", "stopped", "avoided"),
    [
        (["master-0", "worker-0", "worker-1"], (), ["node-worker-2"]),
        (["worker-0", "worker-1", "worker-2"], (), ["node-master-0"]),
        (["master-0"], ("worker-0", "worker-1"), ["node-worker-2"]),
        (["master-0"], ("worker-0", "worker-1", "worker-2"), []),
        (list(ALL), (), []),
    ],
    ids=["a hung worker", "a hung master", "the others stopped in time", "all others stopped in time", "all reported"],
)
def test_the_node_that_said_nothing_is_avoided(
    reporters: list[str], stopped: tuple[str, ...], avoided: list[str]
) -> None:
    cluster = SimCluster(manifest(resources={"nodes": 4, "gpusPerNode": 8, "memory": "1Gi"}))
    cluster.run_to("Running")
    assert lost_contact(cluster, reporters, stopped=stopped) == avoided


def test_a_node_with_a_pod_that_reported_is_not_silent() -> None:
    cluster = SimCluster(manifest(resources={"nodes": 4, "gpusPerNode": 2, "memory": "1Gi"}))
    cluster.settle()
    cluster.pods["job-1-worker-2"]["spec"]["nodeName"] = "node-master-0"
    cluster.run_to("Running")
    assert lost_contact(cluster, ["master-0", "worker-0", "worker-1"]) == []


def test_the_silent_pod_of_a_large_job_is_among_those_recorded() -> None:
    cluster = SimCluster(manifest(resources={"nodes": 100, "gpusPerNode": 8, "memory": "1Gi"}))
    cluster.run_to("Running")
    reporters = [name.removeprefix("job-1-") for name in cluster.pods if name != "job-1-worker-90"]
    assert lost_contact(cluster, reporters) == ["node-worker-90"]
    assert len(cluster.attempts[0]["pods"]) == 64
