"""Each state, condition, reason, event and column is provoked on the real API server, and seen there.

A test declares with ``sees`` the words that it provokes, and fails where the API does not show one of them. The last
test compares all declarations with the tables in the code: a new word without a test here fails it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dpo_operator.reasons import Reason
from dpo_testing.chaosproxy import ChaosProxy, Fault
from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.faketrainer import FakeTrainer
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import (
    CONFIGMAPS,
    DPOJOBS,
    EVENTS,
    NETWORK_POLICIES,
    PODS,
    PYTORCHJOBS,
    ApiError,
    Object,
    eventually,
)
from dpo_testing.operatorprocess import OperatorProcess
from dpo_testing.playedclock import PlayedClock
from dpo_testing.podends import ENDS, job_of
from dpo_testing.stage import DECLARED, Stage, columns, sees
from dpo_testing.witness import Witness, every_word

# test_life.py, test_limits.py and tests/operator/unit have the states and reasons that jobs meet most.
pytestmark = [pytest.mark.slow, pytest.mark.nightly]

DONE = last_words("Succeeded", step=64, total=64, runDir="s3://runs/job/", modelUri="s3://runs/job/model/")
ENDED = ("Finished", "Failed", "Succeeded", "Stalled")
FAST = ("--backoff-base-seconds=0.05", "--backoff-max-seconds=0.05", "--stalled-after-seconds=2")


@pytest.fixture(scope="module")
def stage(cluster: ControlPlane, kubelet: FakeKubelet) -> Iterator[Stage]:
    with ExitStack() as stack:
        witness = stack.enter_context(Witness(cluster.admin))
        space, held = (stack.enter_context(cluster.namespace(name)) for name in ("words", "held"))
        kubelet.hold(held)
        stack.callback(kubelet.release, held)
        flags = ("--scrape-by=pod-ip", *FAST)
        operator = stack.enter_context(OperatorProcess(cluster.kubeconfig, *flags, namespaces=f"{space},{held}"))
        yield Stage(cluster, kubelet, witness, Jobs(cluster.admin, space), Jobs(cluster.admin, held))
        assert operator.exceptions() == []


# --- why attempts end ------------------------------------------------------------------------------------------------


@sees(
    *(f"{place} {reason.value}" for reason in ENDS for place in ("attempt", "event")),
    *(f"{kind} {r.value}" for r in ENDS if r.retry == "permanent" for kind in ENDED),
    *(f"{kind} RestartsExhausted" for kind in ENDED),
    *("state Failed", "state Restarting", "Progressing Restarting", "event Restarting", "event Failed"),
    *("Finished=True", "Failed=True", "Stalled=True", "Succeeded=False", "Progressing=False", "Finite=False"),
    *("LayoutVerified LayoutDiffers", "LayoutVerified=False", "event LayoutDiffers"),
)
def test_causes_that_a_pod_shows(stage: Stage) -> None:
    memory = {"nodes": 1, "gpusPerNode": 0, "memory": "1Gi"}
    for reason in ENDS:
        more: dict[str, Any] = {"resources": memory} if reason is Reason.MemoryLimitExceeded else {}
        stage.jobs.create(manifest(job_of(reason), run_policy={"maxRestarts": 0}, **more))
    for reason, end in ENDS.items():
        end(stage, stage.kubelet.pod(stage.jobs.namespace, f"{job_of(reason)}-1-master-0"))
    for reason, job in [(reason, job_of(reason)) for reason in ENDS]:
        eventually(
            lambda name=job: (stage.jobs.status(name).get("attempts") or [{}])[0].get("endTime"),  # type: ignore[misc]
            what=f"an attempt ends by {reason.value}",
        )
        told = stage.jobs.status(job)["attempts"][0]
        assert (told["reason"], told["failureClass"]) == (reason.value, reason.retry)
    for reason in ENDS:
        stage.jobs.delete(job_of(reason))


@sees("event Retried", "Progressing Retried")
def test_a_failed_job_is_retried(stage: Stage) -> None:
    stage.kubelet.exit(stage.run("stubborn"), 10, last_words("AccessDenied", message="s3://runs/stubborn/ refused"))
    stage.jobs.wait_state("Failed", name="stubborn")
    note = {"metadata": {"annotations": {"dpo-operator.dev/retry": "once"}}}
    stage.cluster.admin.patch(DPOJOBS, stage.jobs.namespace, "stubborn", note)
    stage.kubelet.finish(stage.jobs.namespace, "stubborn-2-master-0", DONE)
    status = stage.jobs.wait_state("Succeeded", name="stubborn")
    assert (status["retried"], status["retriedAttempt"]) == ("once", 1)
    stage.jobs.delete("stubborn")


@sees("attempt PodDeleted", "event PodDeleted")
def test_a_pod_that_is_deleted_by_hand(stage: Stage) -> None:
    pod = stage.kubelet.run_one(stage.held.namespace, stage.hold("deleted")["metadata"]["name"])
    stage.kubelet.keep_terminating(stage.held.namespace)
    # Whatever is deleted in the very second in which training-operator ends a child counts as its cleaning up.
    trainer = stage.cluster.pid("training-operator")
    os.kill(trainer, signal.SIGSTOP)
    try:
        stage.cluster.admin.delete(PODS, stage.held.namespace, pod["metadata"]["name"])
        time.sleep(1.5)
    finally:
        os.kill(trainer, signal.SIGCONT)
    eventually(lambda: stage.held.status("deleted")["attempts"][0].get("reason"), what="the attempt has ended")
    stage.kubelet.finish_terminating(stage.held.namespace)


@sees("attempt PodVanished")
def test_an_end_that_was_not_observed(stage: Stage) -> None:
    """A status is lost, as from a backup without it: of two children the first must be over."""
    stage.kubelet.exit(stage.run("forgotten"), 75, last_words("Communication", message="lost a peer"))
    stage.kubelet.pod(stage.jobs.namespace, "forgotten-2-master-0")
    stage.jobs.wait_state("Running", name="forgotten")
    stage.cluster.admin.patch(DPOJOBS, stage.jobs.namespace, "forgotten", {"status": None}, sub="status")
    status = stage.jobs.wait_state("Running", name="forgotten")
    assert [attempt["number"] for attempt in status["attempts"]] == [1, 2]
    stage.jobs.delete("forgotten")


@sees("attempt InitContainerFailed", "event InitContainerFailed", "attempt StartTimeout", "event StartTimeout")
def test_causes_of_pods_that_never_ran(stage: Stage) -> None:
    stage.hold("too-slow", run_policy={"startTimeoutSeconds": 10, "maxRestarts": 0})
    worker = stage.hold("lonely", "worker", nodes=2, run_policy={"maxRestarts": 0})
    stage.kubelet.fail_init(worker)
    lonely = stage.held.wait_state("Restarting", name="lonely")
    assert (lonely["attempts"][0]["reason"], lonely["chargedRestarts"]) == ("InitContainerFailed", 0)
    assert stage.held.wait_state("Failed", name="too-slow")["attempts"][0]["reason"] == "StartTimeout"


@sees("attempt DeadlineExceeded", "event DeadlineExceeded", *(f"{kind} DeadlineExceeded" for kind in ENDED))
def test_a_deadline(stage: Stage) -> None:
    stage.run("late", run_policy={"activeDeadlineSeconds": 2})
    stage.jobs.wait_state("Failed", name="late")


@sees("attempt Stalled", "event Stalled")
def test_a_trainer_that_answers_but_does_not_advance(stage: Stage, tmp_path: Path) -> None:
    clock = PlayedClock(tmp_path / "clock")
    with (
        stage.cluster.namespace("still") as space,
        OperatorProcess(stage.cluster.kubeconfig, "--scrape-by=pod-ip", namespaces=space, clock=clock),
    ):
        jobs = Jobs(stage.cluster.admin, space)
        jobs.create(manifest("still", run_policy={"stallTimeoutSeconds": 60, "maxRestarts": 0}))
        pod = stage.kubelet.pod(space, "still-1-master-0")
        with FakeTrainer.of(pod) as trainer:
            trainer.say(step=1, total=64)
            eventually(lambda: (jobs.status("still").get("progress") or {}).get("step"), what="it answers")
            clock.set(90)
            jobs.wait_state("Failed", name="still")


@sees(*(f"{kind} RestartsWithoutProgress" for kind in ENDED))
@pytest.mark.nightly  # tests/operator/unit/test_retry.py has the decision
def test_nodes_that_fail_for_ever(stage: Stage) -> None:
    stage.jobs.create(manifest("unlucky", run_policy={"attemptsHistoryLimit": 0}))
    for attempt in range(1, 22):
        stage.kubelet.fail(stage.kubelet.pod(stage.jobs.namespace, f"unlucky-{attempt}-master-0"),
                           disruption="DeletionByPodGC")  # fmt: skip
    stage.jobs.wait_state("Failed", name="unlucky")


# --- whether a job may run, and where it is --------------------------------------------------------------------------


@sees("Accepted=False", "Accepted Rejected", "event Rejected", "state Rejected", "Progressing Rejected",
      "Accepted ChildInvalid", "event ChildInvalid", "Progressing ChildInvalid",
      *(f"{kind} {word}" for kind in ENDED for word in ("Rejected", "ChildInvalid")))  # fmt: skip
def test_specs_that_cannot_run(stage: Stage) -> None:
    stage.jobs.create(manifest("impossible", data={"train": [{"uri": "/data/train.jsonl"}]}))
    volume = {"name": "extra", "emptyDir": {"sizelimit": "1Gi"}}
    stage.jobs.create(manifest("misspelt", podTemplate={"volumes": [volume]}))
    for name in ("impossible", "misspelt"):
        stage.jobs.wait_state("Rejected", name=name)


@sees("Progressing PinnedSpecChanged", "event PinnedSpecChanged")
def test_a_config_map_that_is_replaced(stage: Stage) -> None:
    """No attempt runs from another spec, and none is charged; without the other one, the operator makes its own."""
    pod, space, api = stage.run("pinned", run_policy={"maxRestarts": 1}), stage.jobs.namespace, stage.cluster.admin
    name = stage.jobs.status("pinned")["configMap"]
    mine = api.get(CONFIGMAPS, space, name)
    metadata = {key: mine["metadata"][key] for key in ("name", "labels", "ownerReferences")}
    other = json.loads(mine["data"]["spec.json"])
    other["spec"]["dpo"] = {"beta": 0.3}
    api.delete(CONFIGMAPS, space, name)
    api.create(CONFIGMAPS, space, {"metadata": metadata, "data": {**mine["data"], "spec.json": json.dumps(other)}})
    stage.kubelet.exit(pod, 75, last_words("Communication", message="lost a peer"))
    stage.expect("Progressing PinnedSpecChanged")
    assert stage.jobs.status("pinned")["chargedRestarts"] == 1
    assert "pinned-2" not in stage.jobs.children()
    api.delete(CONFIGMAPS, space, name)
    stage.jobs.patch("pinned", {"runPolicy": {"attemptsHistoryLimit": 1}})  # any edit makes it look again at once
    stage.jobs.wait_child("pinned-2")
    made = api.get(CONFIGMAPS, space, name)
    assert (made["data"], made["immutable"]) == (mine["data"], True)
    stage.jobs.delete("pinned")


@sees("NetworkRestricted=False")
def test_a_running_job_whose_network_policy_cannot_be(stage: Stage) -> None:
    """As a job of a version without NetworkPolicies, where another owner has the name."""
    stage.run("open")
    space, api = stage.jobs.namespace, stage.cluster.admin
    stage.jobs.wait_state("Running", name="open")
    name = stage.jobs.status("open")["networkPolicy"]
    api.delete(NETWORK_POLICIES, space, name)
    api.create(NETWORK_POLICIES, space, {"metadata": {"name": name}, "spec": {"podSelector": {}}})
    api.patch(DPOJOBS, space, "open", {"status": {"networkPolicy": None}}, sub="status")
    stage.expect("NetworkRestricted=False")
    assert stage.jobs.status("open")["state"] == "Running"
    stage.jobs.delete("open")


@sees("event ImagesDiffer")
def test_pods_of_different_images(stage: Stage) -> None:
    space = stage.held.namespace
    names = [stage.hold("mixed", nodes=2)["metadata"]["name"], "mixed-1-worker-0"]
    eventually(lambda: names[1] in stage.held.pods(), what="the worker is there")
    for name, digest in zip(names, "ab", strict=True):
        pod = stage.kubelet.run_one(space, name)
        (container,) = pod["status"]["containerStatuses"]
        container["imageID"] = f"localhost/trainer@sha256:{digest * 64}"
        stage.cluster.admin.patch(PODS, space, name, {"status": {"containerStatuses": [container]}}, sub="status")
    eventually(lambda: "ImagesDiffer" in stage.held.events("mixed"), what="the event")
    eventually(  # the event precedes the status
        lambda: len(stage.held.status("mixed")["attempts"][0].get("imageIDs", ())) == 2, what="both in the status"
    )
    stage.held.delete("mixed")


@sees("Progressing SpecUnreadable", "event SpecUnreadable")
def test_a_spec_of_a_later_version(stage: Stage) -> None:
    """The CRD is newer than the operator: it admits a field that the operator does not know."""
    crds, name = ("apiextensions.k8s.io/v1", "customresourcedefinitions"), "dpojobs.dpo-operator.dev"
    path = ("schema", "openAPIV3Schema", "properties", "spec", "properties", "runPolicy", "properties")

    def serve(field: Object | None) -> None:
        found = stage.cluster.admin.get(crds, None, name)
        policy = functools.reduce(lambda part, key: part[key], path, found["spec"]["versions"][0])
        policy.pop("laterField", None)
        policy |= {"laterField": field} if field is not None else {}
        stage.cluster.admin.patch(crds, None, name, {"spec": {"versions": found["spec"]["versions"]}})

    with stage.cluster.namespace("later") as space:
        jobs = Jobs(stage.cluster.admin, space)
        with OperatorProcess(stage.cluster.kubeconfig, "--scrape-by=off", namespaces=space) as operator:
            jobs.create(manifest("modern"))
            jobs.wait_state("Running", name="modern")
            operator.kill()  # its watch would show the objects by the definition that it began with

            def set_later() -> bool:
                jobs.patch("modern", {"runPolicy": {"laterField": "x"}})
                return "laterField" in jobs.get("modern")["spec"]["runPolicy"]  # else it was pruned

            serve({"type": "string"})
            try:
                eventually(set_later, what="the later field is stored")
                operator.start()
                stage.expect("Progressing SpecUnreadable")
                assert (jobs.status("modern")["state"], set(jobs.children())) == ("Running", {"modern-1"})
            finally:
                jobs.delete("modern")
                serve(None)
            assert operator.exceptions() == []


@sees("state Pending", "Progressing PyTorchJobMissing", "event PyTorchJobMissing")
def test_a_cluster_that_lacks_the_childs_kind(stage: Stage) -> None:
    with stage.cluster.namespace("bare") as space, ChaosProxy(stage.cluster.url, stage.cluster.tls()) as proxy:
        proxy.rules[:] = [lambda call: Fault(status=404) if call.path.startswith("/apis/kubeflow.org") else None]
        kubeconfig = stage.cluster.identity("admin", ["system:masters"], server=proxy.url)
        with OperatorProcess(kubeconfig, "--scrape-by=off", namespaces=space):
            Jobs(stage.cluster.admin, space).create(manifest("early"))
            stage.expect("Progressing PyTorchJobMissing")


@sees("Progressing ChildRefused", "event ChildRefused")
def test_a_quota_without_room(stage: Stage) -> None:
    with stage.cluster.namespace("poor") as space:
        hard = {"count/pytorchjobs.kubeflow.org": "0"}
        quotas, quota = ("v1", "resourcequotas"), {"metadata": {"name": "none"}, "spec": {"hard": hard}}
        stage.cluster.admin.create(quotas, space, quota)
        # No controller counts here; nothing is there to be counted.
        stage.cluster.admin.patch(quotas, space, "none", {"status": {"hard": hard, "used": hard}}, sub="status")

        def refused() -> bool:
            container = {"name": "pytorch", "image": "localhost/other:1"}
            master = {"replicas": 1, "template": {"spec": {"containers": [container]}}}
            body = {"apiVersion": PYTORCHJOBS[0], "kind": "PyTorchJob", "metadata": {"name": "probe"},
                    "spec": {"pytorchReplicaSpecs": {"Master": master}}}  # fmt: skip
            path = f"/apis/{PYTORCHJOBS[0]}/namespaces/{space}/pytorchjobs"
            try:
                stage.cluster.admin.call("POST", path, body, dryRun="All")
            except ApiError as error:
                return error.status == 403
            return False

        eventually(refused, what="the quota is in force")
        with OperatorProcess(stage.cluster.kubeconfig, "--scrape-by=off", namespaces=space):
            jobs = Jobs(stage.cluster.admin, space)
            jobs.create(manifest("needy"))
            jobs.wait_state("Pending", name="needy")
            stage.expect("Progressing ChildRefused")
            assert "exceeded quota" in jobs.conditions("needy")["Progressing"]["message"]


@sees(
    "Progressing ChildNameTaken", "event ChildNameTaken", "Progressing WaitingForNamesake", "event WaitingForNamesake"
)
def test_names_that_are_taken(stage: Stage) -> None:
    container = {"name": "pytorch", "image": "localhost/other:1"}
    master = {"replicas": 1, "template": {"spec": {"containers": [container]}}}
    stranger = {"apiVersion": PYTORCHJOBS[0], "kind": "PyTorchJob", "metadata": {"name": "taken-1"},
                "spec": {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Master": master}}}  # fmt: skip
    stage.cluster.admin.create(PYTORCHJOBS, stage.held.namespace, stranger)
    stage.held.create(manifest("taken"))
    pod = stage.hold("again")
    stage.kubelet.creating(stage.held.namespace, pod["metadata"]["name"])  # a pod without a node goes at once
    stage.kubelet.keep_terminating(stage.held.namespace)
    stage.held.delete("again")
    eventually(lambda: "again-1" not in stage.held.children(), what="the child is gone")
    stage.held.create(manifest("again"))
    stage.expect("Progressing WaitingForNamesake")
    stage.kubelet.finish_terminating(stage.held.namespace)


@sees(
    *("state Starting", "Progressing Starting", "Progressing=False", "Accepted Accepted", "Accepted=True"),
    *("event Accepted", "event PyTorchJobCreated"),
    *(f"{place} {word}" for place in ("Progressing", "event") for word in (
        "Unschedulable", "ImagePullFailed", "ContainerConfigError", "VolumeNotMounted", "PodsRefused",
        "InitContainerRefused",
    )),
)  # fmt: skip
def test_pods_that_do_not_start(stage: Stage) -> None:
    held, kubelet = stage.held.namespace, stage.kubelet
    stage.held.create(manifest("refused", podTemplate={"priorityClassName": "no-such-class"}))
    kubelet.unschedulable(held, stage.hold("homeless")["metadata"]["name"], "0/4 nodes are available.")
    kubelet.waiting(held, stage.hold("unpulled")["metadata"]["name"], "ImagePullBackOff", "Back-off")
    wrong = stage.hold("unset")["metadata"]["name"]
    kubelet.waiting(held, wrong, "CreateContainerConfigError", 'secret "s3-credentials" not found')
    worker = stage.hold("unaided", "worker", nodes=2)["metadata"]["name"]
    kubelet.waiting(held, worker, "ImagePullBackOff", "Back-off", init=True)
    pod = stage.hold("unmounted")
    kubelet.creating(held, pod["metadata"]["name"])
    about = {"kind": "Pod", "name": pod["metadata"]["name"], "namespace": held, "uid": pod["metadata"]["uid"]}
    event = {"metadata": {"name": "unmounted.1"}, "involvedObject": about, "reason": "FailedMount", "type": "Warning",
             "message": "MountVolume.SetUp failed", "source": {"component": "kubelet"}}  # fmt: skip
    stage.cluster.admin.create(EVENTS, held, event)


@sees(
    *("state Running", "Progressing Running", "Progressing=True", "event TrainingStarted"),
    *("state Checkpointing", "Progressing Checkpointing", "Suspended Checkpointing", "attempt Suspended"),
    "event Checkpointing",
    *("state Suspended", "Progressing Suspended", "Suspended Suspended", "event Suspended", "Suspended=True"),
    *("Suspended Resumed", "event Resumed", "Suspended=False", "attempt Succeeded", "event Expired"),
    *("state Succeeded", "Progressing Succeeded", "Finished Succeeded", "Succeeded Succeeded", "Failed Succeeded"),
    *("event Succeeded", "Succeeded=True", "Failed=False"),
)
def test_a_life_with_a_pause(stage: Stage) -> None:
    stage.run("paused", run_policy={"ttlSecondsAfterFinished": 1})
    stage.jobs.wait_state("Running", name="paused")
    stage.jobs.patch("paused", {"runPolicy": {"suspend": True}})
    stage.jobs.wait_state("Suspended", name="paused")
    stage.jobs.patch("paused", {"runPolicy": {"suspend": False}})
    stage.kubelet.finish(stage.jobs.namespace, "paused-2-master-0", DONE)
    eventually(lambda: stage.jobs.api.find(DPOJOBS, stage.jobs.namespace, "paused") is None, what="it has expired")


@sees("Finished AlreadyComplete", "Succeeded AlreadyComplete", "Failed AlreadyComplete", "Progressing AlreadyComplete",
      "event AlreadyComplete")  # fmt: skip
def test_a_run_directory_that_held_the_finished_run(stage: Stage) -> None:
    stage.run("copied")
    words = {**json.loads(DONE), "alreadyComplete": True}
    stage.kubelet.finish(stage.jobs.namespace, "copied-1-master-0", json.dumps(words))
    status = stage.jobs.wait_state("Succeeded", name="copied")
    assert (status["modelURI"], status["progress"]["step"]) == ("s3://runs/job/model/", 64)


@sees("Finished StoppedEarly", "Succeeded StoppedEarly", "Failed StoppedEarly", "Progressing StoppedEarly",
      "event StoppedEarly")  # fmt: skip
def test_a_run_that_stopped_early(stage: Stage) -> None:
    stage.run("early")
    best = {"metric": "val/loss", "step": 20, "value": 0.5}
    words = {**json.loads(DONE), "stoppedEarly": "val/loss has not improved", "best": best, "modelStep": 20}
    stage.kubelet.finish(stage.jobs.namespace, "early-1-master-0", json.dumps(words))
    status = stage.jobs.wait_state("Succeeded", name="early")
    assert (status["modelStep"], status["progress"]["best"]) == (20, best)


# --- what the run itself shows, and how it is printed ----------------------------------------------------------------


@sees(
    *("ProgressAvailable ScrapeSucceeded", "ProgressAvailable ScrapeFailed", "event ScrapeFailed"),
    *("ReferenceConsistent PolicyEqualsReference", "ReferenceConsistent PolicyDiffersFromReference"),
    *("event PolicyDiffersFromReference", "Finite LossFinite", "Finite LossNotFinite", "event LossNotFinite"),
    *("Learning AboveChance", "Learning TooEarly", "Learning AtChance", "Learning MarginNegative"),
    *("event AtChance", "event MarginNegative", "TrainingStalled StepsAdvance", "TrainingStalled NoStep"),
    *("event NoStep", "event CheckpointSaved", "Learning=Unknown"),
    *("SlowRank RanksKeepPace", "SlowRank RankIsSlow", "event RankIsSlow"),
    *("LayoutVerified LayoutAgrees", "LayoutVerified=True", "LayoutVerified LayoutNotCompared"),
    *(f"{kind}={truth}" for truth in ("True", "False") for kind in (
        "ProgressAvailable", "ReferenceConsistent", "Finite", "Learning", "TrainingStalled", "SlowRank",
    )),
)  # fmt: skip
def test_what_trainers_say(stage: Stage) -> None:
    with ExitStack() as stack:
        pods = {name: stage.run(name, nodes=1) for name in ("well", "wrong", "chance")}
        trainers = {n: stack.enter_context(FakeTrainer.of(pod)) for n, pod in pods.items()}

        first = {"well": math.log(2), "wrong": 2.0}
        slow = {1000: 5}

        def say(name: str, step: int, acc: float, margin: float, **more: float | None) -> None:
            seen: dict[str, float | None]
            seen = {"train/acc": acc, "train/rewards_margin": margin, "train/loss": 0.6, "train/slowest_rank": 5.0}
            seen |= more
            metrics = {key.replace("_saved", ""): value for key, value in seen.items() if value is not None}
            trainers[name].say(step=step, total=2000, metrics=metrics, lastCheckpointStep=step - step % 1000,
                               slowRank=slow.get(step), layoutVerified=True if name == "well" else None,
                               layoutVerdict="verified",
                               firstPreferenceLoss=first.get(name),
                               expectedFirstPreferenceLoss=math.log(2))  # fmt: skip
            eventually(lambda: (stage.jobs.status(name).get("progress") or {}).get("step") == step,
                       what=f"{name} at step {step}")  # fmt: skip

        say("well", 1, 0.9, 0.5)
        say("wrong", 1, 0.5, 0.0, **{"train/loss": None})
        say("chance", 1, 0.5, 0.0)
        say("well", 1000, 0.9, 0.5)
        say("wrong", 200, 0.5, -0.5, **{"train/loss": None})
        say("chance", 200, 0.5, 0.1)
        for reason in ("NoStep", "StepsAdvance"):
            eventually(lambda: stage.jobs.conditions("chance")["TrainingStalled"]["reason"], until=reason.__eq__,
                       what=f"chance is seen as {reason}")  # fmt: skip
            say("chance", 201, 0.5, 0.1)
    # They are gone, and their pods run on.


@sees("state Queued", "Progressing Queued", "event Queued")
def test_a_job_that_its_queue_holds(stage: Stage) -> None:
    stage.held.create(manifest("waits", run_policy={"queueName": "team-a"}))
    child = eventually(lambda: "waits-1" in stage.held.children() and "waits-1", what="its PyTorchJob")
    suspended = {"spec": {"runPolicy": {"suspend": True}}}  # as Kueue does
    stage.cluster.admin.patch(PYTORCHJOBS, stage.held.namespace, child, suspended)


def test_every_column_is_printed(stage: Stage) -> None:
    policy = {"queueName": "team-a"}
    stage.jobs.create(manifest("shown", run_policy=policy, resources={"nodes": 2, "gpusPerNode": 8}))
    first = stage.kubelet.pod(stage.jobs.namespace, "shown-1-master-0")
    stage.kubelet.exit(first, 75, last_words("Communication", message="lost a peer"))
    rank0 = stage.kubelet.pod(stage.jobs.namespace, "shown-2-master-0")
    with FakeTrainer.of(rank0) as trainer:
        trainer.say(step=12, total=64, etaSeconds=90, layout="T8 P1 D2",
                    metrics={"train/acc": 0.75, "train/loss": 0.61, "train/rewards_margin": 0.25})  # fmt: skip
        row = eventually(
            lambda: columns(stage, "shown"),
            until=lambda row: row.get("MESSAGE", "").startswith("Training"),
            what="a row",
        )
    age = row.pop("AGE")
    assert age[:-1].isdigit(), age
    assert row == {
        "NAME": "shown", "STATE": "Running", "STEP": "12/64", "ACC": "0.75", "MARGIN": "0.25", "RESTARTS": "1",
        "NODES": "2", "LOSS": "0.6100", "ETA": "1m", "GPUS": "8", "LAYOUT": "T8 P1 D2",
        "QUEUE": "team-a",
        "MESSAGE": "Training, step 12 of 64.",
    }  # fmt: skip
    crds = ("apiextensions.k8s.io/v1", "customresourcedefinitions")
    served = stage.cluster.admin.get(crds, None, "dpojobs.dpo-operator.dev")["spec"]["versions"][0]
    printed = {column["name"].upper() for column in served["additionalPrinterColumns"]}
    assert printed == row.keys() - {"NAME"} | {"AGE"}


# --- nothing is left out ---------------------------------------------------------------------------------------------


def test_no_word_is_left_out() -> None:
    words = every_word()
    assert {word.rpartition(" ")[2] for word in words} >= {reason.value for reason in Reason}
    assert words - DECLARED == set()
    assert {w for w in DECLARED - words if not w.startswith("Progressing")} == {"Learning=Unknown"}
