"""Why an attempt ended, from the evidence of all of its pods.

Within a pod the first of these decides: the trainer's termination message, if it names a cause; the container's reason;
what Kubernetes did to the pod (DisruptionTarget); a termination message that only reports the loss of another process;
the exit code. Of all pods, the cause of lowest rank (``Reason.rank``) explains the attempt: a permanent cause ends the
job whatever else happened, and a lost node explains why its peers lost contact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from dpo_api.errors import Outcome
from dpo_api.progress import LAST_WORDS_MAX_BYTES, LastWords
from dpo_api.status import PodRecord
from dpo_operator.backend import initcontainer, pytorchjob
from dpo_operator.progress import INT_MAX, bounded
from dpo_operator.reasons import WEAK, Reason, named, of_outcome
from dpo_operator.texts import clean, last_line
from dpo_operator.types import Object
from dpo_operator.view import moment

FailureClass = Literal["infrastructure", "retryable", "permanent"]

UNSPECIFIC_OUTCOMES = frozenset({Outcome.Internal, Outcome.Communication, Outcome.Stopped})
"""Outcomes that may only be consequences of another failure: what Kubernetes reports takes precedence."""

DISRUPTIONS: Mapping[str, Reason] = {
    "DeletionByTaintManager": Reason.NodeLost,
    "DeletionByPodGC": Reason.NodeLost,
    "EvictionByEvictionAPI": Reason.Drained,
    "PreemptionByScheduler": Reason.Preempted,
    "TerminationByKubelet": Reason.Evicted,
}
"""Reasons of the pod condition DisruptionTarget."""

POD_REASONS: Mapping[str, Reason] = {
    "Evicted": Reason.Evicted,
    "NodeLost": Reason.NodeLost,
    "NodeShutdown": Reason.NodeShutdown,
    "Shutdown": Reason.NodeShutdown,
    "Terminated": Reason.NodeShutdown,
    "Preempting": Reason.Preempted,
    "UnexpectedAdmissionError": Reason.AdmissionFailed,
    "NodeAffinity": Reason.AdmissionFailed,
    "TopologyAffinityError": Reason.AdmissionFailed,
}
"""``status.reason`` of a pod; besides these, OutOf<resource> is a rejection by the kubelet."""

CONTAINER_REASONS: Mapping[str, Reason] = {
    "StartError": Reason.ContainerStartFailed,
    "ContainerCannotRun": Reason.ContainerStartFailed,
    "RunContainerError": Reason.ContainerStartFailed,
    "CreateContainerError": Reason.ContainerStartFailed,
}

LOST_CONTAINERS = frozenset({"Unknown", "ContainerStatusUnknown"})
"""Container reasons by which containerd (exit code 255) and the kubelet (137) report a container whose end they did not
see, as after a reboot of its node."""


_COUNTS = ("step", "total", "attempt", "last_checkpoint_step", "model_step")


@dataclass(frozen=True)
class Cause:
    """Why a pod, or an attempt, ended."""

    reason: Reason
    message: str
    pod: str = ""
    node: str | None = None

    @property
    def failure_class(self) -> FailureClass:
        """Whether another attempt could help."""
        assert self.reason.retry != "none", self.reason  # noqa: S101 - success is no cause
        return self.reason.retry

    @property
    def is_decisive(self) -> bool:
        """Whether it explains an attempt by itself. Weak evidence does so only if there is nothing better."""
        return self.reason.rank < WEAK

    @property
    def is_final(self) -> bool:
        """Whether it ends the job."""
        return self.failure_class == "permanent"

    def outranks(self, reason: Reason) -> bool:
        """Whether it explains an attempt better than the recorded cause.

        Only a final cause replaces the operator's own decision to end the attempt, since the next attempt would fail
        the same way.
        """
        return self.is_final if reason.ended_by_operator else self.reason.rank < reason.rank


def last_words(pod: Object) -> LastWords | None:
    """Return the trainer's termination message, bounded to what the status can hold; None if there is none."""
    return _words_in(_terminated(pod))


def _words_in(terminated: Mapping[str, Any] | None) -> LastWords | None:
    text = (terminated or {}).get("message")
    if not isinstance(text, str) or len(text.encode()) > LAST_WORDS_MAX_BYTES:
        return None
    try:
        words = LastWords.from_json(text)
    except ValidationError:
        return None
    changes: dict[str, Any] = {name: INT_MAX for name in _COUNTS if (getattr(words, name) or 0) > INT_MAX}
    metrics = bounded(words.metrics)
    if metrics != words.metrics:
        changes["metrics"] = metrics
    return words.model_copy(update=changes) if changes else words


def success(pods: Iterable[Object]) -> LastWords | None:
    """Return rank 0's termination message if it reports success: it does so only after writing the export's marker."""
    for pod in pods:
        if pytorchjob.is_rank_zero(pod):
            words = last_words(pod)
            if words is not None and words.known_outcome is Outcome.Succeeded:
                return words
    return None


def cause_of_pod(pod: Object, *, memory_limit: str | None, over_at: float | None) -> Cause | None:
    """Return why a pod ended or is ending; None while it runs, or if it succeeded.

    ``memory_limit``: the job's own (spec.resources.memory). ``over_at``: when the PyTorchJob was marked failed or
    succeeded; deletions after that are clean-up.
    """
    terminated = _terminated(pod)
    words = _words_in(terminated)
    outcome = words.known_outcome if words is not None else None
    if outcome is Outcome.Succeeded:
        return None
    specific = outcome not in UNSPECIFIC_OUTCOMES
    return (
        (_of_words(pod, words) if specific else None)
        or (_of_container(pod, terminated, memory_limit) if terminated is not None else None)
        or _of_disruption(pod)
        or (_of_words(pod, words) if words is not None else None)
        or (_of_exit_code(pod, terminated) if terminated is not None else None)
        or _of_init_container(pod)
        or _of_deletion(pod, over_at)
    )


def _cause(reason: Reason, pod: Object, message: str) -> Cause:
    node = (pod.get("spec") or {}).get("nodeName")
    return Cause(reason, clean(message), str(pod["metadata"]["name"]), str(node) if node else None)


def _place(pod: Object) -> str:
    node = (pod.get("spec") or {}).get("nodeName")
    return f"{pod['metadata']['name']} on node {node}" if node else str(pod["metadata"]["name"])


def _terminated(pod: Object) -> Mapping[str, Any] | None:
    status = pytorchjob.trainer_status(pod)
    state = (status or {}).get("state") or {}
    terminated: Mapping[str, Any] | None = state.get("terminated")
    return terminated


def _of_words(pod: Object, words: LastWords | None) -> Cause | None:
    if words is None:
        return None
    outcome = words.known_outcome
    return _cause(of_outcome(outcome), pod, words.message or outcome.description)


def _of_container(pod: Object, terminated: Mapping[str, Any], memory_limit: str | None) -> Cause | None:
    reason = str(terminated.get("reason") or "")
    if reason == "OOMKilled":
        if memory_limit is not None:
            text = f"pod {_place(pod)} used more memory than spec.resources.memory {memory_limit}; raise it"
            return _cause(Reason.MemoryLimitExceeded, pod, text)
        given = pytorchjob.trainer_memory_limit(pod)
        if given is not None:
            text = f"pod {_place(pod)} used more memory than {given}, its limit from the namespace's LimitRange"
            return _cause(Reason.MemoryLimitExceeded, pod, f"{text}; set spec.resources.memory to a higher value")
        return _cause(Reason.NodeOutOfMemory, pod, f"pod {_place(pod)} was killed because the node ran out of memory")
    if reason in CONTAINER_REASONS:
        text = f"pod {_place(pod)} failed to start: {clean(str(terminated.get('message') or reason), 500)}"
        return _cause(CONTAINER_REASONS[reason], pod, text)
    return None


_DONE_TO: Mapping[Reason, str] = {
    Reason.NodeLost: "node {node} was lost",
    Reason.Drained: "node {node} was drained",
    Reason.Preempted: "a pod of higher priority preempted it on node {node}",
    Reason.Evicted: "node {node} evicted its pod",
    Reason.NodeShutdown: "node {node} was shut down",
    Reason.AdmissionFailed: "node {node} refused its pod",
}


def _of_disruption(pod: Object) -> Cause | None:
    status = pod.get("status") or {}
    detail = str(status.get("message") or "")
    reason: Reason | None = None
    for condition in status.get("conditions") or ():
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            reason = DISRUPTIONS.get(str(condition.get("reason")))
            detail = detail or str(condition.get("message") or "")
    named = str(status.get("reason") or "")
    if reason is None or reason is Reason.Evicted:
        reason = POD_REASONS.get(named) or (Reason.AdmissionFailed if named.startswith("OutOf") else reason)
    if reason is None:
        return None
    if reason is Reason.Evicted and "exceeds the" in detail and "emptyDir" in detail.replace("EmptyDir", "emptyDir"):
        reason = Reason.ScratchLimitExceeded
        text = f"pod {_place(pod)} exceeded its volume size: {clean(detail, 500)}; raise spec.resources.scratch or shm"
        return _cause(reason, pod, text)
    node = (pod.get("spec") or {}).get("nodeName") or "unknown"
    text = f"{_DONE_TO[reason].format(node=node)} (pod {pod['metadata']['name']})"
    return _cause(reason, pod, f"{text}: {clean(detail, 500)}" if detail else text)


def _of_exit_code(pod: Object, terminated: Mapping[str, Any]) -> Cause | None:
    code = terminated.get("exitCode")
    if not isinstance(code, int):
        return None
    if terminated.get("reason") in LOST_CONTAINERS:
        text = f"the container of pod {_place(pod)} was lost, as in a reboot of the node"
        return _cause(Reason.NodeLost, pod, text)
    said = last_line(str(terminated.get("message") or ""))
    tail = f": {said}" if said else ""
    outcome = Outcome.of_exit_code(code)
    if outcome is Outcome.Succeeded:
        return None
    if outcome is None:
        signal = f"signal {code - 128}" if 128 < code < 160 else f"exit code {code}"
        return _cause(
            Reason.Killed, pod, f"pod {_place(pod)} was terminated by {signal} without a termination message{tail}"
        )
    return _cause(of_outcome(outcome), pod, f"pod {_place(pod)} exited with code {code} ({outcome.name}){tail}")


def _of_init_container(pod: Object) -> Cause | None:
    asked = _asked_to_go(pod)
    for status in (pod.get("status") or {}).get("initContainerStatuses") or ():
        terminated = (status.get("state") or {}).get("terminated")
        if status.get("name") == initcontainer.NAME and terminated and terminated.get("exitCode"):
            ended = moment(terminated.get("finishedAt"))
            if asked is not None and (ended is None or ended >= asked):
                return None  # it was stopped with its pod
            text = (
                f"init container {initcontainer.NAME} of pod {_place(pod)} did not find the master's DNS name in time"
            )
            return _cause(Reason.InitContainerFailed, pod, text)
    return None


def _of_deletion(pod: Object, over_at: float | None) -> Cause | None:
    asked = _asked_to_go(pod)
    if asked is None:
        return None
    # Times have whole seconds: a deletion in the same second as the failure counts as clean-up.
    if over_at is not None and asked >= over_at:
        return None
    return _cause(Reason.PodDeleted, pod, f"pod {_place(pod)} was deleted while it was running")


def _asked_to_go(pod: Object) -> float | None:
    """Return when a pod was deleted; its deletionTimestamp is when its grace period ends."""
    due = moment(pod["metadata"].get("deletionTimestamp"))
    return None if due is None else due - float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)


def exit_code(pod: Object) -> int | None:
    """Return the exit code of a pod's trainer; None while there is none."""
    code = (_terminated(pod) or {}).get("exitCode")
    return code if isinstance(code, int) and 0 <= code <= 255 else None


def record_of(pod: Object, cause: Cause | None) -> PodRecord:
    """Return what the status keeps of a pod."""
    node = (pod.get("spec") or {}).get("nodeName")
    return PodRecord(
        name=str(pod["metadata"]["name"]),
        node=str(node) if node else None,
        exit_code=exit_code(pod),
        reason=cause.reason.value if cause is not None else None,
    )


def cause_of_record(record: PodRecord) -> Cause | None:
    """Return the recorded cause of a pod that may no longer exist."""
    reason = named(record.reason, Reason.Succeeded)
    if reason.retry == "none":
        return None
    where = f"{record.name} on node {record.node}" if record.node else record.name
    return Cause(reason, f"pod {where}: {reason.meaning}", record.name, record.node)


def decisive(causes: Sequence[Cause]) -> Cause | None:
    """Return the cause that explains an attempt: the one of lowest rank; of equal ones the first pod's."""
    return min(causes, key=lambda cause: cause.reason.rank, default=None)
