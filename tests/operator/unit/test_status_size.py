"""A status stays small: however many attempts, pods and long messages, and however little the API server takes."""

from __future__ import annotations

import json

import pytest

from dpo_api.errors import Outcome
from dpo_api.status import Attempt, Condition, DPOJobStatus, PodRecord, StatusProgress
from dpo_operator import patches, size
from dpo_testing.simcluster import SimCluster, manifest

NODE = (
    "gke-cluster-with-a-long-name-pool-h100-mega-80gb-with-gang-scheduling-{:08x}-{:04d}.c.a-long-project-name.internal"
)
MOMENT = "2026-01-01T00:00:00Z"


def attempt(number: int) -> Attempt:
    name = f"llama-3-70b-helpful-and-harmless-{number}"
    pods = tuple(
        PodRecord(name=f"{name}-worker-{i}", node=NODE.format(number, i), exit_code=75, reason="Communication")
        for i in range(64)
    )
    return Attempt(
        number=number, child=name, start_time=MOMENT, running_time=MOMENT, end_time=MOMENT, from_step=50, last_step=99,
        result="Failed", failure_class="infrastructure", reason="Communication", message="x" * 1000, pods=pods,
    )  # fmt: skip


def grown(message: str = "y" * 4000) -> DPOJobStatus:
    """Return what 128 attempts of a job with 64 pods leave."""
    conditions = tuple(
        Condition(type=f"Type{i}", status="True", last_transition_time=MOMENT, reason="Reason", message=message)
        for i in range(11)
    )
    metrics = {f"train/metric_{i}": 0.123456789 * i for i in range(128)}
    return DPOJobStatus(
        observed_generation=1, state="Running", message=message, conditions=conditions,
        attempts=tuple(attempt(number) for number in range(3, 131)), attempt=130, restarts=129, charged_restarts=2,
        progress=StatusProgress(phase="train", step=99, metrics=metrics, last_checkpoint_step=50),
        final_metrics=metrics,
    )  # fmt: skip


def length(status: DPOJobStatus) -> int:
    return len(json.dumps(patches.to_json(status)))


def test_the_newest_five_attempts_keep_their_pods_and_older_ones_a_count() -> None:
    nodes = {"nodes": 3, "gpusPerNode": 8, "memory": "1Gi"}
    cluster = SimCluster(manifest(resources=nodes, runPolicy={"maxRestarts": 50}))
    cluster.run_to("Running")
    for number in range(1, 8):
        cluster.lose_attempt(number)
    assert [len(a.get("pods", [])) for a in cluster.attempts] == [0, 0, 0, 3, 3, 3, 3, 3]
    assert [a.get("podsOmitted") for a in cluster.attempts] == [3, 3, 3, None, None, None, None, None]
    assert [a["reason"] for a in cluster.attempts[:-1]] == ["Communication"] * 7


def test_a_status_of_an_older_operator_is_made_smaller() -> None:
    cluster = SimCluster()
    cluster.run_to("Running")
    assert cluster.job is not None
    old = patches.to_json(grown().model_copy(update={"conditions": ()}))["attempts"]
    for entry in old:
        entry["child"] = f"job-{entry['number']}"
    newest = {**cluster.attempts[0], "number": 131, "child": "job-131"}
    cluster.job["status"] |= {"attempts": [*old[1:], newest], "attempt": 131}
    assert len(json.dumps(cluster.status)) > 1_500_000
    cluster.settle()
    assert len(json.dumps(cluster.status)) < 1.1 * size.LIMITS[0]
    assert cluster.attempts[-1]["number"] >= 131


@pytest.mark.parametrize("limit", size.LIMITS)
def test_a_grown_status_fits_into_each_limit(limit: int) -> None:
    status = grown()
    kept = size.fit(status, limit)
    assert length(kept) < 1.1 * max(limit, 6000), "spaces aside; the conditions alone are 4 KB"
    newest = kept.attempts[-1]
    assert (newest.number, newest.reason, newest.child) == (130, "Communication", attempt(130).child)
    assert len(newest.pods) + (newest.pods_omitted or 0) == 64
    assert {c.type for c in kept.conditions} == {c.type for c in status.conditions}
    assert (kept.restarts, kept.charged_restarts, kept.state) == (129, 2, "Running")
    assert kept.progress is not None
    assert kept.progress.last_checkpoint_step == 50
    DPOJobStatus.model_validate(patches.to_json(kept))
    assert size.fit(kept, limit) == kept, "it needs no second write"


def test_the_oldest_goes_first() -> None:
    kept = size.fit(grown("short"))
    pods = [len(a.pods) for a in kept.attempts]
    assert pods[-1] == 64
    assert pods == sorted(pods)
    messages = [a.message is not None for a in kept.attempts]
    assert messages == sorted(messages)
    numbers = [a.number for a in kept.attempts]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 130


def test_a_small_status_is_left_as_it_is() -> None:
    status = grown("short").model_copy(update={"attempts": (attempt(1), attempt(2))})
    assert size.fit(status) is status


@pytest.mark.parametrize("limit", [200_000, 20_000, 5000])
def test_a_job_whose_large_status_is_refused_lives_on_with_a_smaller_one(limit: int) -> None:
    cluster = SimCluster(manifest(resources={"nodes": 64, "gpusPerNode": 8, "memory": "1Gi"}))
    cluster.object_limit = limit
    cluster.run_to("Running")
    for number in (1, 2):
        for pod in cluster.pods_of(f"job-{number}")[1:]:
            cluster.end_pod(pod["metadata"]["name"], Outcome.Communication, message="lost contact " * 60)
        cluster.settle()
        cluster.kill_leaving()
        cluster.settle()
        cluster.sleep_out()
        cluster.run_to("Running")
    assert cluster.created == ["job-1", "job-2", "job-3"]
    assert cluster.attempts[-1]["number"] == 3
    cluster.end_pod("job-3-master-0", Outcome.Succeeded, step=9, total=9, model_uri="s3://runs/job/model/")
    cluster.settle()
    assert cluster.condition("Succeeded") == ("True", "Succeeded")
    assert len(json.dumps(cluster.status)) <= limit
