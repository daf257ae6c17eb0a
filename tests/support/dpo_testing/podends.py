"""How the only pod of an attempt ends, for each cause that such an end can have."""

from __future__ import annotations

from collections.abc import Callable

from dpo_api.errors import Outcome
from dpo_operator.reasons import Reason
from dpo_testing.fakekubelet import last_words
from dpo_testing.kubeapi import PYTORCHJOBS, Object
from dpo_testing.stage import Stage


def job_of(reason: Reason) -> str:
    """Return the name of the DPOJob whose first attempt ends for this reason."""
    return f"c-{reason.value.lower()}"


def _says(outcome: Outcome) -> Callable[[Stage, Object], None]:
    words = last_words(outcome.name, message=outcome.description)
    return lambda stage, pod: stage.kubelet.exit(pod, outcome.exit_code, words)


def _is_disrupted(
    disruption: str | None, reason: str | None = None, message: str = ""
) -> Callable[[Stage, Object], None]:
    return lambda stage, pod: stage.kubelet.fail(pod, reason, message, disruption=disruption)


def _exits(code: int, reason: str | None = None) -> Callable[[Stage, Object], None]:
    return lambda stage, pod: stage.kubelet.exit(pod, code, reason=reason)


def _child_is_deleted(stage: Stage, pod: Object) -> None:
    child = f"{job_of(Reason.ChildDeleted)}-1"
    stage.cluster.admin.delete(PYTORCHJOBS, stage.jobs.namespace, child, propagationPolicy="Background")


ENDS: dict[Reason, Callable[[Stage, Object], None]] = {
    **{Reason[outcome.name]: _says(outcome) for outcome in Outcome if outcome is not Outcome.Succeeded},
    Reason.MemoryLimitExceeded: _exits(137, "OOMKilled"),
    Reason.NodeOutOfMemory: _exits(137, "OOMKilled"),
    Reason.Killed: _exits(139),
    Reason.ContainerStartFailed: _exits(128, "StartError"),
    Reason.FinalWordsLost: _exits(0),
    Reason.NodeLost: _is_disrupted("DeletionByPodGC"),
    Reason.Preempted: _is_disrupted("PreemptionByScheduler"),
    Reason.Evicted: _is_disrupted("TerminationByKubelet", "Evicted", "The node was low on resource: memory."),
    Reason.ScratchLimitExceeded: _is_disrupted(
        None, "Evicted", 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi".'
    ),
    Reason.NodeShutdown: _is_disrupted(None, "Terminated", "Pod was terminated in response to imminent node shutdown."),
    Reason.AdmissionFailed: _is_disrupted(None, "UnexpectedAdmissionError", "Allocate failed"),
    Reason.Drained: lambda stage, pod: stage.kubelet.evict(pod["metadata"]["namespace"], pod["metadata"]["name"]),
    Reason.ChildDeleted: _child_is_deleted,
}
"""What happens to the only pod of an attempt that ends for each of these causes."""
