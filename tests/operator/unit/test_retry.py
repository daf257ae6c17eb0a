"""The annotation dpo-operator.dev/retry: a failed job starts again from its newest checkpoint, once for each value."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_operator.config import Settings
from dpo_testing.simcluster import Crash, SimCluster, manifest

CHECKPOINT = 40


def annotate(cluster: SimCluster, value: str | None) -> None:
    """Set or remove the annotation."""
    assert cluster.job is not None
    annotations = cluster.job["metadata"].setdefault("annotations", {})
    annotations["dpo-operator.dev/retry"] = value
    if value is None:
        del annotations["dpo-operator.dev/retry"]
    cluster.touch()


def fail(cluster: SimCluster, outcome: Outcome = Outcome.AccessDenied, attempt: int = 1) -> None:
    """End a running attempt with a failure, and let its other pods go."""
    cluster.end_pod(f"job-{attempt}-worker-0", outcome, message="s3://runs/job/ refused")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()


def evict(cluster: SimCluster) -> None:
    """Run the newest attempt and evict its pods."""
    cluster.run_to("Running")
    for name in [name for name, pod in cluster.pods.items() if pod["status"]["phase"] == "Running"]:
        cluster.delete_pod(name, condition="EvictionByEvictionAPI")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()


def failed(outcome: Outcome = Outcome.AccessDenied, **policy: Any) -> SimCluster:
    """Return a job whose first attempt failed for good, after a checkpoint."""
    cluster = SimCluster(manifest(runPolicy={"maxRestarts": 0, **policy}))
    cluster.run_to("Running")
    cluster.say(step=50, metrics={"train/loss": 0.6}, last_checkpoint_step=CHECKPOINT)
    cluster.settle()
    fail(cluster, outcome)
    assert cluster.state == "Failed", cluster.status
    return cluster


def test_a_failed_job_starts_again_from_its_newest_checkpoint() -> None:
    cluster = failed()
    annotate(cluster, "now")
    cluster.settle()
    assert cluster.state == "Starting"
    assert cluster.created == ["job-1", "job-2"]
    assert cluster.attempts[1]["fromStep"] == CHECKPOINT
    assert cluster.status["retried"] == "now"
    assert "completionTime" not in cluster.status
    assert cluster.condition("Finished") is None
    assert cluster.condition("Failed") is None
    assert cluster.event_reasons().count("Retried") == 1
    retried = next(event for event in cluster.events.values() if event["reason"] == "Retried")
    assert retried["type"] == "Normal"
    assert f"Attempt 2 continues from step {CHECKPOINT}." in retried["message"]


def test_a_value_works_once() -> None:
    cluster = failed()
    annotate(cluster, "now")
    cluster.run_to("Running")
    fail(cluster, attempt=2)
    assert cluster.state == "Failed"
    annotate(cluster, None)
    cluster.settle()
    annotate(cluster, "now")
    cluster.settle()
    assert cluster.created == ["job-1", "job-2"]
    annotate(cluster, "again")
    cluster.settle()
    assert cluster.created == ["job-1", "job-2", "job-3"]
    # Each end and each retry has an event of its own.
    assert cluster.event_reasons().count("Failed") == 2
    assert cluster.event_reasons().count("Retried") == 2


def test_charged_restarts_start_again() -> None:
    cluster = SimCluster(manifest(runPolicy={"maxRestarts": 1}))
    cluster.run_to("Running")
    cluster.lose_attempt(1)
    fail(cluster, Outcome.StorageUnavailable, attempt=2)
    assert cluster.condition("Failed") == ("True", "RestartsExhausted")
    annotate(cluster, "now")
    cluster.run_to("Running")
    assert cluster.status["chargedRestarts"] == 0
    fail(cluster, Outcome.StorageUnavailable, attempt=3)
    assert cluster.state == "Restarting"
    assert cluster.status["chargedRestarts"] == 1


def test_failures_before_a_retry_do_not_count_as_failures_in_a_row() -> None:
    cluster = SimCluster(manifest(), Settings(infrastructure_restarts_without_progress=2))
    for _ in range(3):
        cluster.sleep_out()
        evict(cluster)
    assert cluster.condition("Failed") == ("True", "RestartsWithoutProgress")
    annotate(cluster, "now")
    evict(cluster)
    assert cluster.state == "Restarting"


def test_the_deadline_starts_again() -> None:
    cluster = SimCluster(manifest(runPolicy={"activeDeadlineSeconds": 600}))
    cluster.run_to("Running")
    cluster.advance(601)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.condition("Failed") == ("True", "DeadlineExceeded")
    annotate(cluster, "now")
    cluster.run_to("Running")
    assert cluster.created == ["job-1", "job-2"]
    cluster.advance(599)
    cluster.settle()
    assert cluster.state == "Running"


def test_the_start_time_out_starts_again() -> None:
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 600, "maxRestarts": 0}))
    cluster.settle()
    cluster.advance(601)
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "StartTimeout"
    assert cluster.state == "Failed"
    annotate(cluster, "now")
    cluster.settle()
    cluster.advance(599)
    cluster.settle()
    assert cluster.state == "Starting"
    assert cluster.created == ["job-1", "job-2"]


def test_a_loss_that_was_not_finite_is_no_finding_about_the_next_attempt() -> None:
    cluster = failed(Outcome.NonFinite)
    assert cluster.condition("Finite") == ("False", "LossNotFinite")
    annotate(cluster, "now")
    cluster.settle()
    assert cluster.condition("Finite") is None


def test_a_suspended_job_stays_suspended() -> None:
    cluster = failed()
    cluster.edit(suspend=True)
    annotate(cluster, "now")
    cluster.settle()
    assert cluster.state == "Suspended"
    assert cluster.created == ["job-1"]
    cluster.edit(suspend=False)
    cluster.settle()
    assert cluster.created == ["job-1", "job-2"]


def test_a_value_from_before_the_failure_asks_for_nothing() -> None:
    """A manifest that still has the value of an earlier retry, and is created again, fails as any other."""
    cluster = SimCluster(manifest(runPolicy={"maxRestarts": 0}))
    annotate(cluster, "old")
    cluster.run_to("Running")
    assert cluster.status["retried"] == "old"
    fail(cluster)
    assert cluster.state == "Failed"
    assert cluster.created == ["job-1"]
    assert "Retried" not in cluster.event_reasons()


def test_a_job_that_succeeded_is_not_retried() -> None:
    cluster = SimCluster()
    cluster.run_to("Running")
    for role in ("worker", "master"):
        cluster.end_pod(f"job-1-{role}-0", Outcome.Succeeded, step=100, total=100, model_uri="s3://runs/job/model")
    cluster.settle()
    status = copy.deepcopy(cluster.status)
    annotate(cluster, "now")
    cluster.settle()
    assert cluster.status == status
    assert cluster.created == ["job-1"]


def test_a_push_that_failed_for_good_shows_the_model_and_is_retried() -> None:
    cluster = SimCluster()
    cluster.run_to("Running")
    said = "the model is whole in s3://runs/job/model, but it was not pushed: the token may not write"
    words: dict[str, Any] = {"step": 100, "total": 100, "model_uri": "s3://runs/job/model", "model_step": 100}
    cluster.end_pod("job-1-worker-0", Outcome.Succeeded, step=100, total=100)
    cluster.end_pod("job-1-master-0", Outcome.AccessDenied, message=said, **words)
    cluster.settle()
    assert cluster.state == "Failed"
    assert said in cluster.status["message"]
    assert (cluster.status["modelURI"], cluster.status["modelStep"]) == ("s3://runs/job/model", 100)
    assert "hubURI" not in cluster.status
    annotate(cluster, "now")
    cluster.run_to("Running")
    assert cluster.created == ["job-1", "job-2"]
    commit = "hf://org/aligned@" + "0" * 40
    for role in ("worker", "master"):
        cluster.end_pod(f"job-2-{role}-0", Outcome.Succeeded, already_complete=True, hub_uri=commit, **words)
    cluster.settle()
    assert (cluster.state, cluster.status["hubURI"]) == ("Succeeded", commit)


def test_a_rejected_job_is_not_retried() -> None:
    cluster = SimCluster(manifest(checkpoint={"uri": "runs/job"}))
    cluster.settle()
    assert cluster.state == "Rejected"
    annotate(cluster, "now")
    cluster.settle()
    assert cluster.state == "Rejected"
    assert "Retried" not in cluster.event_reasons()


def test_a_job_that_failed_under_version_0_1_is_retried() -> None:
    cluster = failed()
    cluster.status.pop("retried", None)
    cluster.status["conditions"] = [c for c in cluster.status["conditions"] if c["type"] != "Stalled"]
    annotate(cluster, "now")
    cluster.settle()
    assert cluster.created == ["job-1", "job-2"]


def test_the_time_to_live_ends_with_a_retry() -> None:
    cluster = failed(ttlSecondsAfterFinished=100)
    cluster.advance(101)  # it is due, but the retry came first
    annotate(cluster, "now")
    cluster.settle()
    assert cluster.job is not None
    assert cluster.created == ["job-1", "job-2"]


@pytest.mark.parametrize("value", ["x" * 300, "y\n" * 200, "ü" * 300])
def test_any_text_will_do(value: str) -> None:
    cluster = failed()
    annotate(cluster, value)
    cluster.settle()
    assert cluster.created == ["job-1", "job-2"]
    assert len(cluster.status["retried"]) <= 256


@pytest.mark.parametrize("calls", range(9))
def test_an_operator_that_is_killed_meanwhile_retries_once(calls: int) -> None:
    cluster = failed()
    annotate(cluster, "now")
    with contextlib.suppress(Crash):
        cluster.reconcile(budget=calls % 3)
    with contextlib.suppress(Crash):
        cluster.reconcile(budget=calls // 3)
    cluster.settle()
    assert cluster.created == ["job-1", "job-2"]
    assert [attempt["number"] for attempt in cluster.attempts] == [1, 2]
    assert cluster.event_reasons().count("Retried") == 1
