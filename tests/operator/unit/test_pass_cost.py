"""What one pass over a job of 1,024 pods does, counted in calls: unlike a time, the count is the same everywhere."""

from __future__ import annotations

import cProfile
import pstats

import pytest

from dpo_api.errors import Outcome
from dpo_operator.reconcile import reconcile
from dpo_operator.view import View
from dpo_testing.simcluster import SimCluster, manifest

PODS = 1024


def calls_per_pod(cluster: SimCluster) -> float:
    observed = cluster.observed()
    profile = cProfile.Profile()
    profile.runcall(reconcile, observed, cluster.now, cluster.settings)
    return float(pstats.Stats(profile).total_calls) / PODS  # type: ignore[attr-defined]  # typeshed lacks it


@pytest.fixture(scope="module")
def starting() -> SimCluster:
    cluster = SimCluster(manifest(resources={"nodes": PODS, "gpusPerNode": 8, "memory": "1Gi"}))
    cluster.settle()
    return cluster


def test_a_pass_reads_each_pod_a_few_times(starting: SimCluster) -> None:
    assert calls_per_pod(starting) < 100
    starting.run_pods()
    starting.settle()
    assert calls_per_pod(starting) < 100
    for name in list(starting.pods):
        starting.end_pod(name, Outcome.Communication, message="lost contact with another process", step=50)
    assert calls_per_pod(starting) < 150


def test_pods_are_sorted_once(starting: SimCluster) -> None:
    view = View.of(starting.observed())
    (attempt,) = view.status.attempts
    pods = view.pods(attempt)
    assert view.pods(attempt) is pods
    assert [pod["metadata"]["name"] for pod in pods[:3]] == ["job-1-master-0", "job-1-worker-0", "job-1-worker-1"]
    assert len(pods) == PODS
