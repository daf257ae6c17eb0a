"""A job's life, policy by policy: what is decided, in which order, and what is said about it."""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_api.progress import Best
from dpo_operator import clock, draft, ends, names, patches
from dpo_operator.backend import pytorchjob
from dpo_operator.config import Settings
from dpo_operator.reconcile import reconcile
from dpo_operator.restarts import backoff
from dpo_operator.types import ChildCheck, Observed, PatchStatus, Refusal
from dpo_operator.view import View
from dpo_testing.simcluster import START, Crash, SimCluster, avoided, manifest

DONE: dict[str, Any] = {
    "step": 100,
    "total": 100,
    "run_dir": "s3://runs/job/",
    "model_uri": "s3://runs/job/model",
    "metrics": {"train/loss": 0.1, "val/acc": 0.91, "val/rewards_margin": 1.5},
}


def finish(cluster: SimCluster, attempt: int = 1) -> None:
    for role in ("worker", "master"):
        cluster.end_pod(f"job-{attempt}-{role}-0", Outcome.Succeeded, **DONE)
    cluster.settle()


def running(**spec: Any) -> SimCluster:
    cluster = SimCluster(manifest(**spec))
    cluster.run_to("Running")
    return cluster


# -- from apply to the model


def test_a_pod_is_asked_as_it_was_created() -> None:
    """A certificate that an installation gets later does not change the pods that are there."""
    cluster = running()
    cluster.settings = replace(cluster.settings, trainer_metrics_secret="trainer-metrics")
    cluster.advance(600)
    cluster.reconcile()
    assert cluster.decision.scrape is not None
    assert not cluster.decision.scrape.https
    cluster = SimCluster(settings=cluster.settings)
    cluster.run_to("Running")
    assert cluster.decision.scrape is not None
    assert cluster.decision.scrape.https


def test_from_apply_to_the_model() -> None:
    cluster = SimCluster()
    cluster.reconcile()
    assert cluster.calls == ["PatchStatus", "EmitEvent"], "acceptance is stored before anything is created for it"
    assert (cluster.state, cluster.decision.follow) == ("Pending", True)
    cluster.reconcile()
    assert cluster.calls[2:] == ["CreateConfigMap", "CreateNetworkPolicy", "CreateChild", "EmitEvent", "PatchStatus"]
    assert cluster.state == "Starting"
    cluster.run_to("Running")
    assert cluster.decision.scrape is not None
    assert cluster.decision.scrape.pod == "job-1-master-0"
    assert not cluster.decision.scrape.https
    cluster.advance(3600)
    finish(cluster)
    status = cluster.status
    assert status["state"] == "Succeeded"
    assert status["modelURI"] == "s3://runs/job/model"
    assert status["finalMetrics"] == DONE["metrics"]
    assert status["summary"] == {"step": "100/100", "accuracy": "0.91", "margin": "1.50", "loss": "0.1000"}
    assert status["completionTime"] == clock.to_text(START + 3600)
    assert status["admittedSeconds"] == 3600
    for kind in ("Finished", "Succeeded"):
        assert cluster.condition(kind) == ("True", "Succeeded")
    assert cluster.condition("Failed") == ("False", "Succeeded")
    assert cluster.condition("Progressing") == ("False", "Succeeded")
    assert cluster.event_reasons() == ["Accepted", "PyTorchJobCreated", "TrainingStarted", "Succeeded"]


def test_a_quiet_job_costs_no_call() -> None:
    cluster = running()
    calls = len(cluster.calls)
    for _ in range(20):
        cluster.sleep()
    assert len(cluster.calls) == calls
    finish(cluster)
    calls = len(cluster.calls)
    cluster.advance(1e6)
    cluster.settle()
    assert len(cluster.calls) == calls
    assert cluster.decision.wake is None


def test_success_though_the_pytorchjob_says_failed() -> None:
    """Which one wins in training-operator depends on the order of a Go map."""
    cluster = running()
    cluster.end_pod("job-1-master-0", Outcome.Succeeded, **DONE)
    cluster.end_pod("job-1-worker-0", Outcome.Communication, message="the master is gone")
    cluster.settle()
    assert cluster.condition("Succeeded") == ("True", "Succeeded")


def test_rank_zeros_word_counts_before_training_operator_speaks() -> None:
    cluster = running()
    cluster.end_pod("job-1-master-0", Outcome.Succeeded, **DONE)
    cluster.reconcile()
    assert cluster.state == "Succeeded"


def test_the_pytorchjobs_word_alone_is_no_success() -> None:
    cluster = running()
    cluster.end_pod("job-1-master-0", code=0, message="no words")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "FinalWordsLost"
    cluster.sleep()
    assert cluster.created == ["job-1", "job-2"], "the next attempt asks the run directory"


# -- acceptance


def test_rejected_with_everything_that_is_wrong_and_no_child() -> None:
    spec = {
        "checkpoint": {"uri": "runs/job"},
        "training": {"packing": {"maxTokens": 100}},
        "podTemplate": {"labels": {"dpo-operator.dev/job": "x"}},
    }
    cluster = SimCluster(manifest(**spec))
    cluster.settle()
    assert cluster.state == "Rejected"
    assert cluster.condition("Accepted") == ("False", "Rejected")
    message = cluster.status["message"]
    assert message.startswith("3 errors: ")
    for field in ("spec.checkpoint.uri", "spec.training.packing.maxTokens", "spec.podTemplate.labels"):
        assert field in message
    assert not cluster.children
    assert cluster.event_reasons() == ["Rejected"]
    for kind in ("Finished", "Failed", "Stalled"):
        assert cluster.condition(kind) == ("True", "Rejected")
    assert cluster.condition("Succeeded") == ("False", "Rejected")
    assert cluster.status["completionTime"] == clock.to_text(START)
    assert cluster.decision.wake is None, "without a time to live nothing is due"
    calls = len(cluster.calls)
    cluster.advance(10_000)
    cluster.settle()
    assert len(cluster.calls) == calls


def test_a_rejected_job_that_is_corrected_runs() -> None:
    cluster = SimCluster(manifest(training={"packing": {"maxTokens": 100}}))
    cluster.settle()
    cluster.advance(60)
    cluster.edit_spec(training={"packing": {"maxTokens": 200}})
    cluster.settle()
    assert cluster.condition("Finished") == ("True", "Rejected")
    assert "200 cannot hold every pair" in cluster.status["message"]
    assert cluster.status["completionTime"] == clock.to_text(START + 60), "its time to live starts again"
    assert cluster.event_reasons() == ["Rejected", "Rejected"]
    cluster.edit_spec(training={})
    cluster.run_to("Running")
    assert "completionTime" not in cluster.status
    for kind in ("Finished", "Failed", "Succeeded", "Stalled"):
        assert cluster.condition(kind) is None
    assert cluster.condition("Accepted") == ("True", "Accepted")
    (pinned,) = cluster.config_maps.values()
    assert "maxTokens" not in pinned["data"]["spec.json"]
    assert cluster.status["acceptedSpecDigest"] == pytorchjob.digest(pinned["data"]["spec.json"])
    finish(cluster)
    assert cluster.state == "Succeeded"


@pytest.mark.parametrize("wrong", [{"training": {"packing": {"maxTokens": 100}}}, {"dpo": {"beta": -1}}],
                         ids=["as a whole", "in one field"])  # fmt: skip
def test_the_time_to_live_of_a_rejected_job(wrong: dict[str, Any]) -> None:
    cluster = SimCluster(manifest(runPolicy={"ttlSecondsAfterFinished": 100}, **wrong))
    cluster.settle()
    assert cluster.decision.wake == 100
    cluster.sleep()
    assert cluster.job is None
    assert cluster.event_reasons() == ["Rejected", "Expired"]


def test_a_job_that_0_1_0_rejected_ends() -> None:
    """Its status has the rejection, but no end."""
    cluster = SimCluster(manifest(dpo={"beta": -1}))
    cluster.settle()
    assert cluster.job is not None
    status = cluster.job["status"]
    status["conditions"] = [c for c in status["conditions"] if c["type"] in {"Accepted", "Progressing"}]
    del status["completionTime"]
    cluster.settle()
    assert cluster.condition("Finished") == ("True", "Rejected")


def test_nothing_is_created_for_a_spec_that_is_edited_while_it_is_accepted() -> None:
    """The pass that read the old spec only writes the status, with the version that it read: a conflict refuses it."""
    cluster = SimCluster()
    assert cluster.job is not None
    version = cluster.job["metadata"]["resourceVersion"]
    absent = frozenset({names.config_map("job", "uid-1")})
    late = replace(cluster.observed(), check=ChildCheck(1), absent=absent)
    cluster.edit_spec(dpo={"beta": 0.3})
    (write,) = reconcile(late, START, cluster.settings).actions
    assert isinstance(write, PatchStatus)
    assert write.body["metadata"]["resourceVersion"] == version != cluster.job["metadata"]["resourceVersion"]
    cluster.settle()
    (pinned,) = cluster.config_maps.values()
    assert '"beta": 0.3' in pinned["data"]["spec.json"]


def test_unparsable_specs_are_rejected_too() -> None:
    cluster = SimCluster(manifest(dpo={"beta": -1}))
    cluster.settle()
    assert cluster.condition("Accepted") == ("False", "Rejected")
    assert "spec.dpo.beta" in cluster.status["message"]


def test_the_api_servers_no_to_a_dry_run_rejects() -> None:
    cluster = SimCluster(manifest(podTemplate={"topologySpreadConstraints": [{"maxSkw": 1}]}))
    cluster.invalid = Refusal(400, 'strict decoding error: unknown field "maxSkw"')
    cluster.settle()
    assert cluster.condition("Accepted") == ("False", "ChildInvalid")
    assert 'unknown field "maxSkw"' in cluster.status["message"]
    assert not cluster.created
    calls = len(cluster.calls)
    cluster.settle()
    assert len(cluster.calls) == calls


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(403, 'exceeded quota: pytorchjobs "10"'),
        Refusal(400, 'admission webhook "team.example.com" denied the request: no team'),
        Refusal(422, "ValidatingAdmissionPolicy 'team' with binding 'all' denied request: no team"),
    ],
    ids=lambda refusal: str(refusal.code),
)
def test_a_policys_no_is_waited_out(refusal: Refusal) -> None:
    """Whatever its code: webhooks and policies that name none answer as if the object were wrong."""
    cluster = SimCluster()
    cluster.invalid = refusal
    cluster.settle()
    assert cluster.state == "Pending"
    assert cluster.condition("Progressing") == ("False", "ChildRefused")
    assert cluster.condition("Accepted") is None
    assert refusal.message in cluster.status["message"]
    cluster.invalid = None
    cluster.sleep()
    assert cluster.created == ["job-1"]


def test_a_refused_create_is_reported_and_retried() -> None:
    cluster = SimCluster()
    cluster.refuse["job-1"] = Refusal(403, "admission webhook said no")
    cluster.settle()
    assert cluster.condition("Progressing") == ("False", "ChildRefused")
    assert cluster.attempts == []
    cluster.refuse.clear()
    cluster.sleep()
    assert cluster.created == ["job-1"]


def test_waits_for_training_operator() -> None:
    cluster = SimCluster()
    cluster.backend_installed = False
    cluster.settle()
    assert cluster.condition("Progressing") == ("False", "PyTorchJobMissing")
    assert not cluster.config_maps
    cluster.backend_installed = True
    cluster.sleep()
    assert cluster.created == ["job-1"]


def test_image_is_pinned_for_every_attempt() -> None:
    cluster = running()
    cluster.settings = replace(cluster.settings, trainer_image="trainer:newer")
    cluster.end_pod("job-1-worker-0", Outcome.Communication)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    cluster.sleep()
    template = cluster.children["job-2"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert template["spec"]["containers"][0]["image"] == "trainer:test"


def test_image_pinned_before_a_crash_is_kept() -> None:
    cluster = SimCluster()
    cluster.reconcile()
    with pytest.raises(Crash):
        cluster.reconcile(budget=0)
    assert not cluster.config_maps
    cluster.settings = replace(cluster.settings, trainer_image="trainer:newer")
    cluster.settle()
    (pinned,) = cluster.config_maps.values()
    assert cluster.status["image"] == pinned["data"]["image"] == "trainer:test"


def test_a_job_whose_status_is_lost_keeps_its_image() -> None:
    cluster = running()
    assert cluster.job is not None
    digest = cluster.status["acceptedSpecDigest"]
    del cluster.job["status"]
    cluster.settings = replace(cluster.settings, trainer_image="trainer:newer")
    cluster.settle()
    assert (cluster.status["image"], cluster.status["acceptedSpecDigest"]) == ("trainer:test", digest)


def pinned_only() -> SimCluster:
    """Return a cluster where the job's ConfigMap exists, and neither its status nor a PyTorchJob."""
    cluster = SimCluster()
    cluster.reconcile()
    with pytest.raises(Crash):
        cluster.reconcile(budget=1)
    assert cluster.config_maps
    assert cluster.job is not None
    del cluster.job["status"]
    return cluster


def test_a_new_job_that_finds_its_config_map_takes_what_it_pins() -> None:
    cluster = pinned_only()
    (pinned,) = cluster.config_maps.values()
    digest = pytorchjob.digest(pinned["data"]["spec.json"])
    pinned["data"]["launchContract"] = "1"
    cluster.settings = replace(cluster.settings, trainer_image="trainer:newer")
    cluster.settle()
    status = cluster.status
    assert (status["image"], status["acceptedSpecDigest"], status["launchContract"]) == ("trainer:test", digest, 1)
    assert cluster.created == ["job-1"]
    trainer = cluster.children["job-1"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    assert trainer["image"] == "trainer:test"
    assert "--spec-digest" not in trainer["command"]


def test_a_config_map_that_a_new_job_finds_is_taken_before_anything_runs() -> None:
    """Killed after any write: what runs is what the status says."""
    for budget in range(6):
        cluster = pinned_only()
        cluster.settings = replace(cluster.settings, trainer_image="trainer:newer")
        with contextlib.suppress(Crash):
            cluster.reconcile()
            cluster.reconcile(budget=budget)
        if cluster.created:
            assert cluster.status["image"] == "trainer:test"
        cluster.settle()
        assert cluster.status["image"] == "trainer:test"


def test_a_config_map_with_another_spec_that_a_new_job_finds_starts_nothing() -> None:
    cluster = pinned_only()
    cluster.edit_spec(dpo={"beta": 0.3})
    cluster.settle()
    assert cluster.condition("Progressing") == ("False", "PinnedSpecChanged")
    assert cluster.created == []
    cluster.config_maps.clear()
    cluster.sleep()
    assert cluster.created == ["job-1"]


def test_a_job_whose_status_is_lost_and_whose_spec_is_edited_is_not_mixed_up() -> None:
    cluster = running()
    assert cluster.job is not None
    del cluster.job["status"]
    cluster.edit_spec(dpo={"beta": 0.3})
    cluster.settle()
    assert cluster.condition("Progressing") == ("False", "PinnedSpecChanged")
    assert cluster.created == ["job-1"]


def test_warnings_are_reported_and_do_not_block_a_job() -> None:
    cluster = SimCluster(manifest(dpo={"beta": 50}))
    cluster.settle()
    assert "spec.dpo.beta: 50 is far outside the usual" in cluster.status["conditions"][0]["message"]
    assert cluster.created == ["job-1"]


def test_a_spec_of_a_newer_version_is_left_alone_once_accepted() -> None:
    """An older operator after a downgrade: it must not end what it cannot read."""
    cluster = running()
    assert cluster.job is not None
    cluster.job["spec"]["dreams"] = {"electric": True}
    cluster.touch()
    cluster.settle()
    assert cluster.condition("Accepted") == ("True", "Accepted")
    assert cluster.condition("Progressing") == ("False", "SpecUnreadable")
    assert list(cluster.children) == ["job-1"]
    assert cluster.state == "Running"


# -- names that are taken


def stranger(child: str, **owner: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": child, "uid": "theirs", "labels": {"dpo-operator.dev/job": "job"}}
    if owner:
        metadata["ownerReferences"] = [{"controller": True, **owner}]
    return {"metadata": metadata, "spec": {"runPolicy": {}, "pytorchReplicaSpecs": {"Master": {}}}, "_podsMade": True}


def test_a_pytorchjob_of_another_owner_is_left_alone() -> None:
    cluster = SimCluster()
    cluster.children["job-1"] = stranger("job-1")
    cluster.settle()
    assert cluster.condition("Progressing") == ("False", "ChildNameTaken")
    assert cluster.deleted == []
    del cluster.children["job-1"]
    cluster.sleep()
    assert cluster.created == ["job-1"]


def test_a_recreated_job_waits_for_the_end_of_the_deleted_one() -> None:
    cluster = SimCluster()
    cluster.children["job-1"] = stranger("job-1", kind="DPOJob", name="job", uid="uid-0")
    cluster.settle()
    assert cluster.condition("Progressing") == ("True", "WaitingForNamesake")
    ghost = {
        "metadata": {"name": "job-3-worker-0", "labels": {"dpo-operator.dev/job-uid": "uid-0"}},
        "status": {"phase": "Running"},
    }
    cluster.pods["job-3-worker-0"] = ghost
    del cluster.children["job-1"]
    cluster.sleep()
    assert cluster.condition("Progressing") == ("True", "WaitingForNamesake"), "its pods may still write"
    assert cluster.created == []
    del cluster.pods["job-3-worker-0"]
    cluster.sleep()
    assert cluster.created == ["job-1"]


def test_a_pod_on_a_silent_node_is_given_up_after_its_grace_period() -> None:
    cluster = SimCluster()
    cluster.pods["job-3-worker-0"] = {
        "metadata": {
            "name": "job-3-worker-0",
            "labels": {"dpo-operator.dev/job-uid": "uid-0"},
            "deletionTimestamp": clock.to_text(START + 600),
        },
        "status": {"phase": "Running"},
    }
    cluster.settle()
    cluster.advance(629)
    cluster.settle()
    assert cluster.created == []
    cluster.advance(1)
    cluster.settle()
    assert cluster.created == ["job-1"]


# -- adoption


def test_a_child_created_before_a_crash_is_adopted() -> None:
    cluster = SimCluster()
    cluster.reconcile()
    with pytest.raises(Crash):
        cluster.reconcile(budget=3)
    assert cluster.created == ["job-1"]
    assert cluster.attempts == []
    cluster.settle()
    assert cluster.created == ["job-1"]
    assert [a["number"] for a in cluster.attempts] == [1]


def test_a_blind_cache_is_asked_again_before_a_child_counts_as_lost() -> None:
    cluster = running()
    before = cluster.status
    cluster.reconcile(blind=["job-1"])
    assert cluster.status == before


# -- ends and restarts


@pytest.mark.parametrize("outcome", [o for o in Outcome if o.retry == "permanent"], ids=lambda o: o.name)
def test_a_permanent_error_never_burns_gpus_twice(outcome: Outcome) -> None:
    cluster = running()
    cluster.end_pod("job-1-worker-0", outcome, message="spec.data.train[0]: line 7 is broken")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    cluster.advance(1e6)
    cluster.settle()
    assert cluster.created == ["job-1"]
    assert cluster.state == "Failed"
    assert cluster.condition("Failed") == ("True", outcome.name)
    assert "line 7 is broken" in cluster.status["message"]
    assert cluster.attempts[0]["failureClass"] == "permanent"
    assert outcome.name in cluster.event_reasons()
    assert cluster.event_reasons()[-1] == "Failed"


def test_retryable_errors_are_charged_and_end_with_the_budget() -> None:
    cluster = running(runPolicy={"maxRestarts": 2})
    for attempt in (1, 2, 3):
        cluster.end_pod(f"job-{attempt}-worker-0", Outcome.Communication, message="NCCL timed out")
        cluster.settle()
        cluster.kill_leaving()
        cluster.settle()
        if attempt < 3:
            assert cluster.state == "Restarting"
            assert cluster.status["chargedRestarts"] == attempt
            cluster.sleep()
            cluster.run_to("Running")
    assert cluster.condition("Failed") == ("True", "RestartsExhausted")
    assert "NCCL timed out" in cluster.status["message"]
    assert "maxRestarts 2" in cluster.status["message"]
    assert cluster.created == ["job-1", "job-2", "job-3"]
    assert cluster.status["restarts"] == 2


def lose_node(cluster: SimCluster, attempt: int, *, saved: int | None = None) -> None:
    cluster.delete_pod(f"job-{attempt}-worker-0", condition="DeletionByTaintManager")
    cluster.settle()
    if saved is not None:
        cluster.stop_leaving(saved)
        cluster.settle()
    cluster.kill_leaving()
    cluster.settle()


def test_lost_nodes_are_charged_to_nothing() -> None:
    cluster = running(runPolicy={"maxRestarts": 0})
    for attempt in range(1, 8):
        lose_node(cluster, attempt, saved=attempt * 10)
        assert cluster.state == "Restarting"
        cluster.sleep_out()
        cluster.run_to("Running")
    assert cluster.status["chargedRestarts"] == 0
    assert cluster.status["restarts"] == 7
    assert {a.get("reason") for a in cluster.attempts} == {"NodeLost", None}


def test_lost_nodes_end_a_job_without_progress() -> None:
    cluster = SimCluster(settings=Settings(infrastructure_restarts_without_progress=3))
    cluster.run_to("Running")
    for attempt in range(1, 5):
        lose_node(cluster, attempt)
        if attempt < 4:
            cluster.sleep()
            cluster.run_to("Running")
    assert cluster.condition("Failed") == ("True", "RestartsWithoutProgress")


def test_a_stop_that_saved_nothing_is_no_progress() -> None:
    """Rank 0 was asked to stop because another process was lost: it could not save the step that it had reached."""
    cluster = SimCluster(settings=Settings(infrastructure_restarts_without_progress=2))
    cluster.run_to("Running")
    for attempt in (1, 2, 3):
        cluster.delete_pod(f"job-{attempt}-worker-0", condition="DeletionByTaintManager")
        cluster.settle()
        cluster.end_pod(f"job-{attempt}-master-0", Outcome.Stopped, message="before it could save", step=57, total=100)
        cluster.settle()
        cluster.kill_leaving()
        cluster.settle()
        assert cluster.attempts[-1]["lastStep"] == 57
        assert "lastCheckpointStep" not in cluster.status.get("progress", {})
        if attempt < 3:
            assert "continues from the newest checkpoint, if there is one" in cluster.status["message"]
            cluster.sleep()
            cluster.run_to("Running")
    assert cluster.condition("Failed") == ("True", "RestartsWithoutProgress")


@pytest.mark.parametrize(
    ("seconds", "answers", "lasts"),
    [(3631, False, True), (3630, False, False), (100_000, True, False)],  # an hour, and 30 s of grace
)
def test_an_attempt_without_reports_is_judged_by_its_duration(seconds: int, answers: bool, lasts: bool) -> None:
    """Scraping is off or forbidden, and a lost node leaves no termination message: its checkpoints are unknown."""
    cluster = SimCluster(settings=Settings(infrastructure_restarts_without_progress=2))
    cluster.run_to("Running")
    for attempt in (1, 2, 3):
        if answers:
            cluster.say(phase="reference", step=0, done=7, of=9)
            cluster.settle()
        cluster.advance(seconds)
        lose_node(cluster, attempt)
        if attempt < 3:
            cluster.sleep_out()
            cluster.run_to("Running")
    assert (cluster.state == "Restarting") is lasts
    if lasts:
        assert clock.to_moment(cluster.status["nextAttemptTime"]) - cluster.now < 12, "no pause for what is no series"
    else:
        assert cluster.condition("Failed") == ("True", "RestartsWithoutProgress")


def test_progress_resets_the_pause() -> None:
    cluster = running(runPolicy={"maxRestarts": 100})
    pauses = []
    for attempt in range(1, 6):
        if attempt == 4:
            cluster.say(step=50, last_checkpoint_step=50)
            cluster.settle()
        cluster.end_pod(f"job-{attempt}-worker-0", Outcome.Communication)
        cluster.settle()
        cluster.kill_leaving()
        cluster.settle()
        pauses.append(clock.to_moment(cluster.status["nextAttemptTime"]) - cluster.now)
        cluster.sleep()
        cluster.run_to("Running")
    assert [round(p / 10) for p in pauses] == [1, 2, 4, 1, 1]


def test_the_next_attempt_waits_for_the_last_pod() -> None:
    cluster = running()
    cluster.end_pod("job-1-worker-0", Outcome.Communication)
    cluster.settle()
    cluster.advance(20)
    cluster.settle()
    assert cluster.state == "Restarting"
    assert cluster.attempts[0].get("endTime") is None, "the master has 30 s, and a checkpoint to write"
    cluster.stop_leaving(5)
    cluster.settle()
    assert cluster.attempts[0]["endTime"] == clock.to_text(cluster.now)


def test_a_silent_node_holds_the_next_attempt_for_grace_and_margin_only() -> None:
    cluster = running()
    cluster.delete_pod("job-1-worker-0", condition="DeletionByTaintManager")
    cluster.settle()
    del cluster.pods["job-1-master-0"]
    cluster.advance(59)
    cluster.settle()
    assert cluster.attempts[0].get("endTime") is None
    cluster.advance(1)
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "NodeLost"
    cluster.sleep()
    assert cluster.created == ["job-1", "job-2"]


def test_the_cause_outlives_the_pod() -> None:
    cluster = running()
    cluster.delete_pod("job-1-worker-0", condition="EvictionByEvictionAPI")
    cluster.reconcile()
    del cluster.pods["job-1-worker-0"]
    cluster.children["job-1"]["status"]["conditions"].append(
        {"type": "Failed", "status": "True", "lastTransitionTime": clock.to_text(cluster.now)}
    )
    cluster.end_pod("job-1-master-0", Outcome.Communication, message="lost contact")
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "Drained"


def test_a_deletion_by_hand_is_remembered_when_it_looks_like_the_clean_up() -> None:
    cluster = running()
    cluster.delete_pod("job-1-worker-0")
    cluster.reconcile()
    assert cluster.attempts[0]["pods"][0]["reason"] == "PodDeleted"
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "PodDeleted"


def test_each_attempt_is_explained_by_its_own_pods() -> None:
    cluster = running()
    for attempt, outcome in ((1, Outcome.Internal), (2, Outcome.Communication)):
        cluster.end_pod(f"job-{attempt}-worker-0", outcome)
        cluster.settle()
        cluster.kill_leaving()
        cluster.settle()
        cluster.sleep_out()
        cluster.run_to("Running")
    assert "job-1-worker-0" in cluster.pods, "kept for its log"
    assert [a.get("reason") for a in cluster.attempts] == ["Internal", "Communication", None]


def test_a_later_word_can_be_the_decisive_one() -> None:
    cluster = running()
    cluster.end_pod("job-1-master-0", Outcome.Communication)
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "Communication"
    cluster.end_pod("job-1-worker-0", Outcome.OutOfMemory, message="CUDA out of memory")
    cluster.settle()
    assert cluster.condition("Failed") == ("True", "OutOfMemory")


def test_the_next_attempt_prefers_other_nodes() -> None:
    """Other than those that failed: the master's node is allowed, since the master only stopped on request."""
    cluster = running()
    lose_node(cluster, 1, saved=10)
    cluster.sleep()
    template = cluster.children["job-2"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    wish = template["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0]
    assert wish["preference"]["matchFields"] == [
        {"key": "metadata.name", "operator": "NotIn", "values": ["node-worker-0"]}
    ]


def test_a_deleted_child_is_replaced_and_named() -> None:
    cluster = running()
    cluster.remove_child("job-1")
    cluster.settle()
    cluster.stop_leaving(30)
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "ChildDeleted"
    cluster.sleep()
    assert cluster.created == ["job-1", "job-2"]
    assert cluster.attempts[1]["fromStep"] == 30


def test_backoff_doubles_within_bounds_and_is_spread() -> None:
    settings = Settings()
    waits = [backoff(n, "a", settings) for n in range(1, 60)]
    assert all(a <= b for a, b in itertools.pairwise(waits))
    assert 10 <= waits[0] <= 11
    assert 600 <= waits[-1] <= 660
    assert len({backoff(1, str(key), settings) for key in range(50)}) > 40


# -- starting


def test_an_attempt_that_does_not_start_in_time_is_ended_with_the_pods_message() -> None:
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 600, "maxRestarts": 1}))
    cluster.settle()
    for attempt in (1, 2):
        pod = cluster.pods[f"job-{attempt}-worker-0"]
        pod["spec"] = {}
        pod["status"]["conditions"] = [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no GPU"}
        ]
        cluster.settle()
        assert cluster.condition("Progressing") == ("True", "Unschedulable")
        cluster.advance(599)
        cluster.settle()
        assert f"job-{attempt}" in cluster.children
        cluster.advance(1)
        cluster.settle()
        assert f"job-{attempt}" not in cluster.children, "no GPU is held"
        if attempt == 1:
            assert cluster.state == "Restarting"
            cluster.sleep()
    assert {a["reason"] for a in cluster.attempts} == {"StartTimeout"}
    assert cluster.condition("Failed") == ("True", "RestartsExhausted")
    assert "0/3 nodes: no GPU" in cluster.status["message"]
    assert cluster.deleted == ["job-1", "job-2"]


def waiting(container: str, reason: str, message: str) -> dict[str, Any]:
    return {"name": container, "state": {"waiting": {"reason": reason, "message": message}}}


@pytest.mark.parametrize("leaves", [False, True], ids=["gone", "still there"])
def test_a_node_that_does_not_start_its_pod_is_avoided(leaves: bool) -> None:
    """Our own deletion is all that such a pod shows then, and is nobody else's: no pod counts as PodDeleted."""
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 600}))
    cluster.settle()
    for name, state in (("master", {"running": {}}), ("worker", {"waiting": {"reason": "ContainerCreating"}})):
        phase = "Running" if name == "master" else "Pending"
        containers = [{"name": "pytorch", "state": state}]
        cluster.pods[f"job-1-{name}-0"]["status"] = {"phase": phase, "containerStatuses": containers}
    worker = copy.deepcopy(cluster.pods["job-1-worker-0"])
    cluster.settle()
    cluster.advance(600)
    cluster.settle()
    assert cluster.deleted == ["job-1"]
    assert [record["reason"] for record in cluster.attempts[0]["pods"]] == ["StartTimeout"]
    if leaves:
        gone = {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": "could not be located"}
        containers = [{"name": "pytorch", "state": {"terminated": gone}}]
        worker["metadata"]["deletionTimestamp"] = clock.to_text(cluster.now)
        cluster.pods["job-1-worker-0"] = {**worker, "status": {"phase": "Failed", "containerStatuses": containers}}
        cluster.settle()
    cluster.stop_leaving(0)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "StartTimeout"
    recorded = {record["name"]: record["reason"] for record in cluster.attempts[0]["pods"]}
    assert recorded == {"job-1-worker-0": "StartTimeout", "job-1-master-0": "Stopped"}
    cluster.sleep_out()
    assert avoided(cluster.children["job-2"]) == ["node-worker-0"]


def test_a_worker_that_looks_for_its_master_speaks_against_the_masters_node() -> None:
    cluster = SimCluster(manifest(runPolicy={"startTimeoutSeconds": 600}))
    cluster.settle()
    looks = [{"name": "init-pytorch", "state": {"running": {}}}]
    cluster.pods["job-1-worker-0"]["status"]["initContainerStatuses"] = looks
    cluster.advance(600)
    cluster.settle()
    cluster.sleep_out()
    assert avoided(cluster.children["job-2"]) == ["node-master-0"]


@pytest.mark.parametrize(
    ("statuses", "reason", "truth"),
    [
        ({"containerStatuses": [waiting("pytorch", "ImagePullBackOff", "no such image")]}, "ImagePullFailed", "False"),
        (
            {"containerStatuses": [waiting("pytorch", "CreateContainerConfigError", 'secret "s3" not found')]},
            "ContainerConfigError",
            "False",
        ),
        (
            {"initContainerStatuses": [waiting("init-pytorch", "ErrImagePull", "alpine:3.10")]},
            "InitContainerRefused",
            "False",
        ),
        (
            {"initContainerStatuses": [waiting("init-pytorch", "CreateContainerConfigError", "would run as root")]},
            "InitContainerRefused",
            "False",
        ),
        ({"containerStatuses": [waiting("pytorch", "ContainerCreating", "")]}, "Starting", "True"),
    ],
)
def test_what_a_starting_pod_waits_for(statuses: dict[str, Any], reason: str, truth: str) -> None:
    cluster = SimCluster()
    cluster.settle()
    cluster.pods["job-1-worker-0"]["status"] |= statuses
    cluster.settle()
    assert cluster.condition("Progressing") == (truth, reason)
    if reason != "Starting":
        assert next(iter(statuses.values()))[0]["state"]["waiting"]["message"] in cluster.status["message"]
        assert reason in cluster.event_reasons()
    if reason == "InitContainerRefused":
        assert "--pytorch-init-container-image" in cluster.status["message"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('pods "job-1-worker-0" is forbidden: exceeded quota: gpus', "PodsRefused"),
        (
            'violates PodSecurity "restricted:latest": (container "init-pytorch" must set allowPrivilegeEscalation)',
            "InitContainerRefused",
        ),
    ],
)
def test_refused_pods_show_only_as_an_event(message: str, reason: str) -> None:
    cluster = SimCluster()
    cluster.settle()
    del cluster.pods["job-1-worker-0"]
    cluster.cluster_events = [
        {
            "metadata": {"creationTimestamp": clock.to_text(START)},
            "involvedObject": {"kind": "PyTorchJob", "name": "job-1"},
            "reason": "FailedCreatePod",
            "message": message,
        }
    ]
    cluster.settle()
    assert cluster.condition("Progressing") == ("False", reason)
    assert message in cluster.status["message"]


def test_a_volume_that_is_missing() -> None:
    cluster = SimCluster()
    cluster.settle()
    cluster.cluster_events = [
        {
            "metadata": {"creationTimestamp": clock.to_text(START)},
            "involvedObject": {"kind": "Pod", "name": "job-1-worker-0"},
            "reason": "FailedMount",
            "message": 'persistentvolumeclaim "runs" not found',
        }
    ]
    cluster.settle()
    assert cluster.condition("Progressing") == ("False", "VolumeNotMounted")


@pytest.mark.slow
def test_a_thousand_pods_that_start_are_not_a_thousand_writes() -> None:
    cluster = SimCluster(manifest(resources={"nodes": 100, "gpusPerNode": 0}))
    cluster.settle()
    calls = len(cluster.calls)
    for pod in cluster.pods.values():
        pod["status"] = {"phase": "Running", "containerStatuses": [{"name": "pytorch", "state": {"running": {}}}]}
        cluster.reconcile()
    assert cluster.state == "Running"
    assert len(cluster.calls) - calls <= 12
    assert len(cluster.attempts[0]["pods"]) == 64


# -- suspend and resume


def test_suspend_writes_a_checkpoint_and_resume_is_free() -> None:
    cluster = running(runPolicy={"maxRestarts": 0})
    cluster.edit(suspend=True)
    cluster.settle()
    assert cluster.deleted == ["job-1"]
    assert cluster.state == "Checkpointing"
    assert cluster.condition("Suspended") == ("False", "Checkpointing")
    cluster.stop_leaving(40)
    cluster.settle()
    assert cluster.state == "Suspended"
    assert cluster.condition("Suspended") == ("True", "Suspended")
    assert "step 40" in cluster.status["message"]
    assert cluster.attempts[0]["result"] == "Stopped"
    cluster.kill_leaving()
    cluster.advance(10_000)
    cluster.settle()
    assert cluster.created == ["job-1"]
    cluster.edit(suspend=False)
    cluster.settle()
    assert cluster.created == ["job-1", "job-2"]
    assert cluster.condition("Suspended") == ("False", "Resumed")
    assert cluster.status["chargedRestarts"] == 0
    assert cluster.attempts[1]["fromStep"] == 40
    cluster.run_to("Running")
    finish(cluster, 2)
    assert cluster.state == "Succeeded"
    words = ("Checkpointing", "Suspended", "Resumed")
    assert [reason for reason in cluster.event_reasons() if reason in words] == [*words]


def test_a_stop_is_first_remembered_and_then_done() -> None:
    cluster = running()
    cluster.edit(suspend=True)
    cluster.reconcile()
    assert cluster.attempts[0]["result"] == "Stopped"
    assert cluster.deleted == []
    cluster.reconcile()
    assert cluster.deleted == ["job-1"]


def test_resumed_while_the_stop_is_under_way() -> None:
    cluster = running()
    cluster.edit(suspend=True)
    cluster.settle()
    cluster.edit(suspend=False)
    cluster.settle()
    assert cluster.created == ["job-1"], "its pods still write their checkpoint"
    cluster.stop_leaving(40)
    cluster.reconcile()
    assert cluster.attempts[0]["endTime"] == clock.to_text(cluster.now)
    assert cluster.created == ["job-1"], "first the status must remember the end"
    cluster.reconcile()
    assert cluster.created == ["job-1", "job-2"]


def test_created_suspended() -> None:
    cluster = SimCluster(manifest(runPolicy={"suspend": True}))
    cluster.settle()
    assert cluster.state == "Suspended"
    assert cluster.created == []
    assert cluster.condition("Accepted") == ("True", "Accepted")


def test_resumed_and_killed_before_the_status_is_written() -> None:
    cluster = SimCluster(manifest(runPolicy={"suspend": True}))
    cluster.settle()
    cluster.edit(suspend=False)
    with pytest.raises(Crash):
        cluster.reconcile(budget=3)
    assert cluster.calls[-3:] == ["CreateConfigMap", "CreateNetworkPolicy", "CreateChild"]
    assert cluster.created == ["job-1"]
    cluster.settle()
    assert cluster.condition("Suspended") == ("False", "Resumed")
    assert cluster.event_reasons().count("Resumed") == 1


def test_finished_while_being_suspended_is_finished() -> None:
    cluster = running()
    cluster.edit(suspend=True)
    cluster.settle()
    for name in ("job-1-worker-0", "job-1-master-0"):
        cluster.end_pod(name, Outcome.Succeeded, **DONE)
    cluster.settle()
    assert cluster.state == "Succeeded"


def test_a_permanent_error_while_being_suspended_is_not_forgotten() -> None:
    cluster = running()
    cluster.edit(suspend=True)
    cluster.settle()
    cluster.end_pod("job-1-worker-0", Outcome.InvalidData, message="line 7")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    cluster.edit(suspend=False)
    cluster.settle()
    assert cluster.state == "Failed"
    assert cluster.created == ["job-1"]


# -- queue


@pytest.mark.parametrize(
    ("field", "label", "shown"),
    [("team-a", None, "team-a"), (None, "team-b", "team-b"), ("team-a", "team-b", "team-a"), (None, None, "all")],
)
def test_the_status_names_the_queue_that_children_wait_in(field: str | None, label: str | None, shown: str) -> None:
    body = manifest(runPolicy={"queueName": field} if field else {})
    if label:
        body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": label}
    cluster = SimCluster(body, settings=Settings(default_queue="all"))
    cluster.run_to("Running")
    child = cluster.children["job-1"]
    assert cluster.status["queue"] == child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == shown


def test_a_job_without_a_queue_names_none() -> None:
    cluster = SimCluster(manifest())
    cluster.run_to("Running")
    assert "queue" not in cluster.status


def test_an_edit_of_the_queue_shows_when_the_next_attempt_waits_there() -> None:
    """The child stays in the queue that it was created for."""
    cluster = SimCluster(manifest(runPolicy={"queueName": "slow"}))
    cluster.queue_holds = True
    cluster.settle()
    cluster.edit(queueName="fast")
    cluster.settle()
    assert cluster.status["queue"] == "slow"
    assert "Waiting for queue slow" in cluster.status["message"]
    cluster.remove_child("job-1")
    cluster.settle()
    cluster.sleep_out()
    assert (cluster.state, cluster.status["queue"]) == ("Queued", "fast")


def test_queued_time_counts_for_nothing() -> None:
    policy = {"queueName": "team-a", "startTimeoutSeconds": 600, "activeDeadlineSeconds": 1000}
    cluster = SimCluster(manifest(runPolicy=policy))
    cluster.queue_holds = True
    cluster.settle()
    assert cluster.state == "Queued"
    cluster.advance(100_000)
    cluster.settle()
    assert cluster.state == "Queued"
    assert cluster.status.get("admittedSeconds", 0) == 0
    cluster.children["job-1"]["spec"]["runPolicy"]["suspend"] = False
    cluster.settle()
    assert cluster.state == "Starting"
    cluster.run_to("Running")
    cluster.advance(500)
    cluster.children["job-1"]["spec"]["runPolicy"]["suspend"] = True
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.state == "Queued"
    assert cluster.status["admittedSeconds"] == 500
    assert cluster.created == ["job-1"], "Kueue brings the same child back"
    cluster.children["job-1"]["spec"]["runPolicy"]["suspend"] = False
    cluster.children["job-1"].pop("_podsMade")
    cluster.settle()
    cluster.run_to("Running")
    assert cluster.event_reasons().count("TrainingStarted") == 2
    assert cluster.event_reasons().count("Queued") == 2


def test_resumed_while_old_pods_end_is_a_lost_node_not_a_failure() -> None:
    """training-operator counts the pods of the former admission as failed."""
    cluster = SimCluster(manifest(runPolicy={"queueName": "q", "maxRestarts": 0}))
    cluster.run_to("Running")
    child = cluster.children["job-1"]
    child["spec"]["runPolicy"]["suspend"] = True
    cluster.settle()
    child["spec"]["runPolicy"]["suspend"] = False
    cluster.controller()
    cluster.stop_leaving(20)
    cluster.settle()
    assert cluster.attempts[0]["failureClass"] == "infrastructure"
    assert cluster.state == "Restarting"


def test_preempted_while_its_export_ends_it_leaves_the_queue() -> None:
    """Kueue would admit the suspended child again, and training-operator would run the finished job once more."""
    cluster = SimCluster(manifest(runPolicy={"queueName": "q"}))
    cluster.run_to("Running")
    cluster.children["job-1"]["spec"]["runPolicy"]["suspend"] = True
    cluster.controller()
    cluster.end_pod("job-1-master-0", Outcome.Succeeded, step=100, total=100)
    cluster.reconcile()
    assert cluster.state == "Succeeded"
    cluster.settle()
    assert cluster.deleted == ["job-1"]
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.deleted == ["job-1"]


# -- limits


def test_deadline_ends_with_a_checkpoint_and_no_restart() -> None:
    cluster = running(runPolicy={"activeDeadlineSeconds": 3600})
    cluster.advance(3599)
    cluster.settle()
    assert cluster.state == "Running"
    assert cluster.decision.wake == 1
    cluster.advance(1)
    cluster.settle()
    assert cluster.deleted == ["job-1"]
    assert cluster.state == "Checkpointing"
    cluster.stop_leaving(50)
    cluster.settle()
    assert cluster.condition("Failed") == ("True", "DeadlineExceeded")
    assert cluster.created == ["job-1"]


def test_deadline_counts_attempts_together() -> None:
    cluster = running(runPolicy={"activeDeadlineSeconds": 1000})
    cluster.advance(600)
    lose_node(cluster, 1)
    cluster.advance(5000)
    cluster.settle()
    cluster.run_to("Running")
    cluster.advance(399)
    cluster.settle()
    assert cluster.state == "Running"
    cluster.advance(2)
    cluster.settle()
    assert cluster.attempts[-1]["reason"] == "DeadlineExceeded"


def test_a_job_whose_last_end_used_up_its_time_queues_no_further_attempt() -> None:
    cluster = running(runPolicy={"activeDeadlineSeconds": 1000})
    cluster.advance(990)
    cluster.delete_pod("job-1-worker-0", condition="DeletionByTaintManager")
    cluster.settle()
    cluster.advance(20)
    cluster.stop_leaving(50)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.attempts[0]["reason"] == "NodeLost"
    assert cluster.condition("Failed") == ("True", "DeadlineExceeded")
    assert "runPolicy.activeDeadlineSeconds 1000 has passed" in cluster.status["message"]
    assert cluster.status["restarts"] == 0
    cluster.advance(1e6)
    cluster.settle()
    assert cluster.created == ["job-1"]


@pytest.mark.parametrize("policy", [{}, {"activeDeadlineSeconds": 2000}])
def test_resumed_after_its_time_only_with_more_of_it(policy: dict[str, int]) -> None:
    cluster = running(runPolicy={"activeDeadlineSeconds": 1000})
    cluster.advance(990)
    cluster.edit(suspend=True)
    cluster.settle()
    cluster.advance(20)
    cluster.stop_leaving(50)
    cluster.settle()
    assert cluster.state == "Suspended"
    cluster.edit(suspend=False, **policy)
    cluster.settle()
    if policy:
        assert cluster.created == ["job-1", "job-2"]
    else:
        assert cluster.created == ["job-1"]
        assert cluster.condition("Failed") == ("True", "DeadlineExceeded")


def test_a_raised_deadline_counts_at_once() -> None:
    cluster = running(runPolicy={"activeDeadlineSeconds": 1000})
    cluster.advance(999)
    cluster.edit(activeDeadlineSeconds=5000)
    cluster.advance(2)
    cluster.settle()
    assert cluster.state == "Running"


def test_ttl_deletes_the_job_and_nothing_before() -> None:
    cluster = running(runPolicy={"ttlSecondsAfterFinished": 100})
    finish(cluster)
    assert cluster.decision.wake == 100
    cluster.advance(99)
    cluster.settle()
    assert cluster.job is not None
    cluster.advance(1)
    cluster.settle()
    assert cluster.job is None
    assert cluster.event_reasons()[-1] == "Expired"


@pytest.mark.parametrize(("own", "after"), [({}, 500), ({"ttlSecondsAfterFinished": 100}, 100)])
def test_the_installations_ttl_applies_to_jobs_without_their_own(own: dict[str, int], after: int) -> None:
    cluster = running(runPolicy=own)
    cluster.settings = replace(cluster.settings, default_ttl_seconds_after_finished=500)
    finish(cluster)
    cluster.advance(after - 1)
    cluster.settle()
    assert cluster.job is not None
    cluster.advance(1)
    cluster.settle()
    assert cluster.job is None
    assert cluster.event_reasons()[-1] == "Expired"


def test_every_condition_is_observed_for_the_newest_generation() -> None:
    """kubectl wait takes no notice of one that is older than the last edit."""
    cluster = running()

    def observed() -> set[tuple[str, int]]:
        return {(c["type"], c["observedGeneration"]) for c in cluster.status["conditions"]}

    cluster.edit(maxRestarts=7)
    cluster.settle()
    assert ("Accepted", 2) in observed()
    finish(cluster)
    since = {c["type"]: c["lastTransitionTime"] for c in cluster.status["conditions"]}
    cluster.advance(60)
    cluster.edit(ttlSecondsAfterFinished=3600)
    cluster.settle()
    assert observed() == {(kind, 3) for kind in since}
    assert "Succeeded" in since
    assert {c["type"]: c["lastTransitionTime"] for c in cluster.status["conditions"]} == since
    calls = len(cluster.calls)
    cluster.settle()
    assert len(cluster.calls) == calls


def test_a_job_that_is_reopened_has_no_sign_of_its_end() -> None:
    cluster = running(runPolicy={"ttlSecondsAfterFinished": 100})
    cluster.say(step=5, metrics={"train/loss": 0.6})
    cluster.settle()
    cluster.end_pod("job-1-worker-0", Outcome.InvalidData, message="line 7")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.condition("Stalled") == cluster.condition("Failed") == ("True", "InvalidData")
    assert cluster.status["finalMetrics"] == {"train/loss": 0.6}
    reopened = draft.Draft(View.of(cluster.observed()), cluster.now, cluster.settings)
    ends.reopen(reopened)
    status = patches.to_json(reopened.status)
    assert not {"completionTime", "nextAttemptTime"} & status.keys()
    assert not {"Finished", "Failed", "Succeeded", "Stalled"} & {c["type"] for c in status["conditions"]}
    assert status["finalMetrics"] == {}
    assert status["attempts"] == cluster.attempts


def test_no_ttl_by_default() -> None:
    cluster = running()
    finish(cluster)
    cluster.advance(1e9)
    cluster.settle()
    assert cluster.job is not None


@pytest.mark.parametrize(("limit", "kept"), [(0, ["job-4"]), (2, ["job-2", "job-3", "job-4"])])
def test_history(limit: int, kept: list[str]) -> None:
    cluster = running(runPolicy={"attemptsHistoryLimit": limit, "maxRestarts": 10})
    for attempt in (1, 2, 3):
        cluster.lose_attempt(attempt)
    finish(cluster, 4)
    assert sorted(cluster.children) == kept


def test_a_deleted_job_is_left_to_the_garbage_collector() -> None:
    cluster = running()
    assert cluster.job is not None
    cluster.job["metadata"]["deletionTimestamp"] = clock.to_text(START)
    cluster.touch()
    calls = len(cluster.calls)
    cluster.remove_child("job-1")
    cluster.settle()
    assert len(cluster.calls) == calls


def test_a_run_directory_that_held_the_finished_run() -> None:
    cluster = running()
    for role in ("worker", "master"):
        cluster.end_pod(f"job-1-{role}-0", Outcome.Succeeded, already_complete=True, **DONE)
    cluster.settle()
    assert cluster.condition("Succeeded") == ("True", "AlreadyComplete")
    assert (cluster.state, cluster.status["modelURI"]) == ("Succeeded", DONE["model_uri"])
    assert cluster.event_reasons().count("AlreadyComplete") == 1


def test_a_run_that_stopped_early_has_succeeded() -> None:
    cluster = running()
    why = "val/loss has not improved in 3 validations since step 40, where it was 0.512"
    best = Best(metric="val/loss", step=40, value=0.512)
    words = {**DONE, "step": 70, "best": best, "model_step": 40, "stopped_early": why}
    for role in ("worker", "master"):
        cluster.end_pod(f"job-1-{role}-0", Outcome.Succeeded, **words)
    cluster.settle()
    assert cluster.condition("Succeeded") == ("True", "StoppedEarly")
    assert cluster.condition("Failed") == ("False", "StoppedEarly")
    assert cluster.state == "Succeeded"
    said = f"Stopped early after step 70 of 100: {why}; the model of step 40 is at s3://runs/job/model."
    assert cluster.status["message"] == said
    assert [event for event in cluster.event_reasons() if event in {"StoppedEarly", "Succeeded"}] == ["StoppedEarly"]
    assert cluster.status["progress"]["best"] == {"metric": "val/loss", "step": 40, "value": 0.512}
    assert (cluster.status["modelStep"], cluster.status["summary"]["step"]) == (40, "70/100")


def test_a_second_attempt_that_finds_the_first_ones_export_has_succeeded() -> None:
    cluster = running()
    cluster.lose_attempt(1)
    for role in ("worker", "master"):
        cluster.end_pod(f"job-2-{role}-0", Outcome.Succeeded, already_complete=True, **DONE)
    cluster.settle()
    assert cluster.condition("Succeeded") == ("True", "Succeeded")


def test_many_attempts_keep_the_first_and_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 8 instead of 128: each attempt that a simulated cluster loses takes a tenth of a second."""
    assert draft.ATTEMPTS_KEPT == 128
    monkeypatch.setattr(draft, "ATTEMPTS_KEPT", 8)
    cluster = running(runPolicy={"maxRestarts": 1000, "attemptsHistoryLimit": 0})
    for attempt in range(1, 12):
        cluster.lose_attempt(attempt)
    numbers = [a["number"] for a in cluster.attempts]
    assert numbers == [1, *range(6, 13)]
    assert cluster.status["chargedRestarts"] == 11


def test_a_new_job_asks_one_question() -> None:
    """Its ConfigMap is not looked for: that it exists shows when it is created."""
    cluster = SimCluster()
    observed = cluster.observed()
    decision = reconcile(observed, START, cluster.settings)
    assert [type(a).__name__ for a in decision.actions] == ["CheckChild"]
    decision = reconcile(replace(observed, check=ChildCheck(1)), START, cluster.settings)
    assert [type(a).__name__ for a in decision.actions] == ["PatchStatus"]
    assert [event.body["reason"] for event in decision.later] == ["Accepted"]
    cluster.reconcile()
    decision = reconcile(cluster.observed(), START, cluster.settings)
    assert [type(a).__name__ for a in decision.actions] == [
        "CreateConfigMap", "CreateNetworkPolicy", "CreateChild", "EmitEvent", "PatchStatus",
    ]  # fmt: skip


def test_another_operator_does_no_harm() -> None:
    """The second operator sees what the first one has done, or finds its objects by name."""
    cluster = SimCluster()
    blind = cluster.observed()
    cluster.settle()
    later = Observed(job=blind.job, children=list(cluster.children.values()))
    decision = reconcile(later, START, cluster.settings)
    assert [type(a).__name__ for a in decision.actions] == ["LookUpConfigMap"]
    (pinned,) = cluster.config_maps.values()
    second = reconcile(replace(later, check=ChildCheck(1), config_map=pinned), START, cluster.settings)
    repeated = {type(a).__name__ for a in second.actions} & {"CreateChild", "DeleteChild"}
    assert not repeated, "it adopts what the first has made"
