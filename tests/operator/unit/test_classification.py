"""Why an attempt ended, case by case: one pod's evidence, and what explains an attempt of many pods."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_api.progress import LastWords
from dpo_operator.classification import (
    _DONE_TO,
    DISRUPTIONS,
    POD_REASONS,
    Cause,
    cause_of_pod,
    cause_of_record,
    decisive,
    last_words,
    record_of,
    success,
)
from dpo_operator.reasons import Reason, of_outcome

Object = dict[str, Any]


def words(outcome: Outcome, message: str = "because") -> str:
    return LastWords(outcome=outcome.name, message=message).to_json()


def pod(
    *,
    code: int | None = None,
    message: str = "",
    container: str = "Error",
    phase: str = "Failed",
    disruption: str | None = None,
    pod_reason: str | None = None,
    detail: str = "",
    role: str = "worker",
    **metadata: Any,
) -> Object:
    status: Object = {"phase": phase, "conditions": []}
    if code is not None:
        terminated = {"exitCode": code, "reason": container, "message": message}
        status["containerStatuses"] = [{"name": "pytorch", "state": {"terminated": terminated}}]
    if disruption:
        status["conditions"].append({"type": "DisruptionTarget", "status": "True", "reason": disruption})
    if pod_reason:
        status |= {"reason": pod_reason, "message": detail}
    labels = {"training.kubeflow.org/replica-type": role}
    return {
        "metadata": {"name": f"job-1-{role}-0", "labels": labels, **metadata},
        "spec": {"nodeName": "gpu-7"},
        "status": status,
    }


def cause(one: Object, *, memory: str | None = "1Gi", over_at: float | None = None) -> Reason | None:
    found = cause_of_pod(one, memory_limit=memory, over_at=over_at)
    return None if found is None else found.reason


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.Succeeded], ids=lambda o: o.name)
def test_termination_messages_and_exit_codes_agree(outcome: Outcome) -> None:
    assert cause(pod(code=outcome.exit_code, message=words(outcome))) is of_outcome(outcome)
    assert cause(pod(code=outcome.exit_code, message="a log's last line")) is of_outcome(outcome)
    assert of_outcome(outcome).retry == outcome.retry


CASES: list[tuple[str, Object, Reason | None]] = [
    ("runs", pod(phase="Running"), None),
    ("ended well", pod(code=0, message=words(Outcome.Succeeded), phase="Succeeded", container="Completed"), None),
    ("ended well, wordless", pod(code=0, phase="Succeeded", container="Completed"), None),
    ("own memory limit", pod(code=137, container="OOMKilled"), Reason.MemoryLimitExceeded),
    (
        "memory limit of a worker process",
        pod(code=1, container="OOMKilled", message=words(Outcome.Internal)),
        Reason.MemoryLimitExceeded,
    ),
    (
        "data error is louder than its end",
        pod(code=3, container="OOMKilled", message=words(Outcome.InvalidData)),
        Reason.InvalidData,
    ),
    ("cannot start", pod(code=128, container="StartError", message="exec: python"), Reason.ContainerStartFailed),
    (
        "drained, saved",
        pod(code=143, message=words(Outcome.Stopped), disruption="EvictionByEvictionAPI"),
        Reason.Drained,
    ),
    ("lost node", pod(phase="Running", disruption="DeletionByTaintManager"), Reason.NodeLost),
    ("node removed", pod(disruption="DeletionByPodGC"), Reason.NodeLost),
    ("preempted", pod(code=143, disruption="PreemptionByScheduler"), Reason.Preempted),
    ("evicted", pod(disruption="TerminationByKubelet", pod_reason="Evicted", detail="low on memory"), Reason.Evicted),
    ("shut down", pod(disruption="TerminationByKubelet", pod_reason="NodeShutdown"), Reason.NodeShutdown),
    (
        "scratch is full",
        pod(
            disruption="TerminationByKubelet",
            pod_reason="Evicted",
            detail='Usage of EmptyDir volume "scratch" exceeds the limit "1Gi".',
        ),
        Reason.ScratchLimitExceeded,
    ),
    ("kubelet says no", pod(pod_reason="UnexpectedAdmissionError"), Reason.AdmissionFailed),
    ("no such GPU", pod(pod_reason="OutOfnvidia.com/gpu"), Reason.AdmissionFailed),
    ("unknown disruption", pod(code=1, disruption="SomethingNew"), Reason.Internal),
    ("killed", pod(code=137), Reason.Killed),
    ("crashed", pod(code=139), Reason.Killed),
    ("foreign exit code", pod(code=200), Reason.Killed),
    ("lost in a reboot, says containerd", pod(code=255, container="Unknown"), Reason.NodeLost),
    ("lost in a reboot, says the kubelet", pod(code=137, container="ContainerStatusUnknown"), Reason.NodeLost),
    (
        "evicted, and its container not found",
        pod(code=137, container="ContainerStatusUnknown", disruption="TerminationByKubelet", pod_reason="Evicted"),
        Reason.Evicted,
    ),
    (
        "stopped, and its container not found",
        pod(code=137, container="ContainerStatusUnknown", message=words(Outcome.Stopped)),
        Reason.Stopped,
    ),
    ("words of a newer trainer", pod(code=77, message='{"outcome": "Dreamt", "message": "x"}'), Reason.Internal),
    ("words too long", pod(code=3, message="{" + " " * 5000 + "}"), Reason.InvalidData),
    ("words are a list", pod(code=75, message="[1]"), Reason.Communication),
    (
        "deleted by hand",
        pod(phase="Running", deletionTimestamp="2027-01-15T08:01:00Z", deletionGracePeriodSeconds=30),
        Reason.PodDeleted,
    ),
]


@pytest.mark.parametrize(("one", "reason"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_one_pod(one: Object, reason: Reason | None) -> None:
    assert cause(one) is reason


def test_without_a_limit_of_its_own_memory_is_the_nodes() -> None:
    assert cause(pod(code=137, container="OOMKilled"), memory=None) is Reason.NodeOutOfMemory
    assert Reason.NodeOutOfMemory.retry == "infrastructure"
    assert Reason.MemoryLimitExceeded.retry == "permanent"


def test_a_limit_that_the_namespace_gave_is_the_containers_own() -> None:
    """A job without spec.resources.memory in a namespace with a LimitRange: more attempts would end alike."""
    killed = pod(code=137, container="OOMKilled")
    limit = {"limits": {"memory": "512Mi"}}
    killed["spec"]["containers"] = [{"name": "proxy", "resources": limit}, {"name": "pytorch"}]
    assert cause(killed, memory=None) is Reason.NodeOutOfMemory
    killed["spec"]["containers"][1]["resources"] = limit
    found = cause_of_pod(killed, memory_limit=None, over_at=None)
    assert found is not None
    assert found.reason is Reason.MemoryLimitExceeded
    assert "512Mi" in found.message
    assert "spec.resources.memory" in found.message


def test_the_clean_up_after_a_failure_is_no_cause() -> None:
    leaving = pod(phase="Running", deletionTimestamp="2027-01-15T08:01:00Z", deletionGracePeriodSeconds=30)
    asked = 1_800_000_030.0
    assert cause(leaving, over_at=asked + 1) is Reason.PodDeleted
    assert cause(leaving, over_at=asked) is None
    assert cause(leaving, over_at=asked - 1) is None


def test_the_init_container_did_not_find_the_master() -> None:
    one = pod()
    one["status"]["initContainerStatuses"] = [{"name": "init-pytorch", "state": {"terminated": {"exitCode": 1}}}]
    assert cause(one) is Reason.InitContainerFailed


@pytest.mark.parametrize(
    ("reasons", "explains"),
    [
        ([Reason.Communication, Reason.NodeLost], Reason.NodeLost),
        ([Reason.NodeLost, Reason.InvalidData], Reason.InvalidData),
        ([Reason.Communication, Reason.Communication, Reason.Internal], Reason.Internal),
        ([Reason.Communication, Reason.PodDeleted], Reason.PodDeleted),
        ([Reason.Stopped, Reason.Communication], Reason.Communication),
        ([Reason.Stopped, Reason.Drained], Reason.Drained),
        ([Reason.PodVanished, Reason.Stopped], Reason.Stopped),
        ([Reason.StorageUnavailable, Reason.Drained], Reason.Drained),
        ([Reason.Killed, Reason.MemoryLimitExceeded], Reason.MemoryLimitExceeded),
        ([Reason.Killed, Reason.Internal], Reason.Killed),
    ],
)
def test_many_pods(reasons: list[Reason], explains: Reason) -> None:
    found = decisive([Cause(reason, "") for reason in reasons])
    assert found is not None
    assert found.reason is explains


def test_weak_evidence_explains_an_attempt_only_where_nothing_better_is_found() -> None:
    weak = {reason for reason in Reason if reason.topic == "cause" and not Cause(reason, "").is_decisive}
    assert weak == {
        *(Reason.ChildDeleted, Reason.PodDeleted, Reason.Communication),
        *(Reason.Stopped, Reason.FinalWordsLost, Reason.PodVanished),
    }


@pytest.mark.parametrize(
    ("found", "recorded", "outranks"),
    [
        (Reason.NodeLost, Reason.Killed, True),
        (Reason.Killed, Reason.NodeLost, False),
        (Reason.NodeLost, Reason.NodeLost, False),
        (Reason.PodDeleted, Reason.ChildDeleted, False),
        (Reason.Internal, Reason.ChildDeleted, True),
        (Reason.NodeLost, Reason.Stalled, False),
        (Reason.NodeLost, Reason.Suspended, False),
        (Reason.InvalidData, Reason.Suspended, True),
        (Reason.InvalidData, Reason.DeadlineExceeded, True),
    ],
)
def test_a_better_cause_replaces_the_recorded_one(found: Reason, recorded: Reason, outranks: bool) -> None:
    """Of what the operator ends only a final cause changes the story."""
    assert Cause(found, "").outranks(recorded) is outranks


def test_failures_are_charged_by_their_class() -> None:
    for reason in Reason:
        expected = "always" if reason.retry == "retryable" else "never"
        assert reason.charged == ("after start time-out" if reason is Reason.InitContainerFailed else expected), reason


def test_every_cause_has_a_class_and_survives_being_recorded() -> None:
    for reason in Reason:
        if reason.topic == "cause":
            assert reason.retry != "none", reason
            record = record_of(pod(code=1), Cause(reason, "x"))
            again = cause_of_record(record)
            assert again is not None
            assert again.reason is reason
            assert again.node == "gpu-7"
    assert cause_of_record(record_of(pod(code=0), None)) is None


def test_success_is_rank_zeros_word_alone() -> None:
    said = words(Outcome.Succeeded)
    assert success([pod(code=0, message=said, role="master")]) is not None
    assert success([pod(code=0, message=said, role="worker")]) is None
    assert success([pod(code=0, message="", role="master")]) is None
    assert success([pod(code=3, message=words(Outcome.InvalidData), role="master")]) is None


def test_messages_are_one_clean_line() -> None:
    nasty = words(Outcome.InvalidData, "a\nb\x1b[31mred\u2028c" + "x" * 3000)
    found = cause_of_pod(pod(code=3, message=nasty), memory_limit=None, over_at=None)
    assert found is not None
    assert len(found.message) <= 1000
    assert found.message.startswith("a b [31mred c")
    assert last_words(pod(code=3, message=nasty)) is not None


def test_what_kubernetes_did_to_a_pod_has_a_phrase_for_every_reason() -> None:
    assert {*DISRUPTIONS.values(), *POD_REASONS.values()} <= set(_DONE_TO)
