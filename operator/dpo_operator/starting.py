"""An attempt whose pods are not all running yet: what they wait for, and for how long they may."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_operator import limits
from dpo_operator.backend import initcontainer, pytorchjob
from dpo_operator.classification import Cause
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason
from dpo_operator.texts import clean, sentence
from dpo_operator.types import Object
from dpo_operator.view import moment

PULL_REASONS = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
)
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
MOUNT_REASONS = frozenset({"FailedMount", "FailedAttachVolume"})


@dataclass(frozen=True)
class Obstacle:
    """Why a pod does not start or does not exist."""

    reason: Reason
    message: str

    @property
    def needs_action(self) -> bool:
        """Whether somebody must act, because waiting does not help."""
        return self.reason is not Reason.Unschedulable


def has_run(pod: Object) -> bool:
    """Whether the trainer's container of a pod is running or has been."""
    status = pytorchjob.trainer_status(pod)
    state = (status or {}).get("state") or {}
    if "running" in state or "terminated" in state:
        return True
    return status is None and (pod.get("status") or {}).get("phase") == "Running"


def is_stuck(pod: Object) -> bool:
    """Whether a pod has a node but has not started there. A worker that waits for its master is not stuck."""
    if has_run(pod) or not (pod.get("spec") or {}).get("nodeName"):
        return False
    statuses = (pod.get("status") or {}).get("initContainerStatuses") or ()
    looks = (s for s in statuses if s.get("name") == initcontainer.NAME)
    return not any("running" in (status.get("state") or {}) for status in looks)


def started(draft: Draft) -> bool:
    """Whether every pod of the attempt is running or has been."""
    pods = draft.pods
    return len(pods) >= draft.view.spec.resources.nodes and all(has_run(pod) for pod in pods)


def obstacle(draft: Draft) -> Obstacle | None:
    """Return what keeps pods from starting: the obstacle of lowest rank."""
    pods = draft.pods
    found = [hit for pod in pods for hit in _of_pod(pod, draft.view.observed.events)]
    if len(pods) < draft.view.spec.resources.nodes:
        found += _of_child(draft)
    return min(found, key=lambda hit: hit.reason.rank, default=None)


def _of_pod(pod: Object, events: Iterable[Object]) -> Iterable[Obstacle]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            yield Obstacle(Reason.Unschedulable, f"pod {name}: {clean(str(condition.get('message') or ''))}")
    for container in status.get("initContainerStatuses") or ():
        yield from _of_container(pod, container, init=True)
    for container in status.get("containerStatuses") or ():
        yield from _of_container(pod, container, init=False)
    if status.get("phase") == "Pending" and (pod.get("spec") or {}).get("nodeName"):
        for event in _newest_first(events, "Pod", str(name)):
            if event.get("reason") in MOUNT_REASONS:
                yield Obstacle(Reason.VolumeNotMounted, f"pod {name}: {clean(str(event.get('message') or ''))}")
                return


def _of_container(pod: Object, container: Mapping[str, Any], *, init: bool) -> Iterable[Obstacle]:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason, said = str(waiting.get("reason") or ""), clean(str(waiting.get("message") or ""))
    if reason not in PULL_REASONS | CONFIG_REASONS:
        return
    name, label = pod["metadata"]["name"], container.get("name")
    text = f"pod {name}, container {label}: {reason}" + (f": {said}" if said else "")
    if init and label == initcontainer.NAME:
        yield Obstacle(Reason.InitContainerRefused, f"{sentence(text)}; {initcontainer.FIX}")
    else:
        yield Obstacle(Reason.ImagePullFailed if reason in PULL_REASONS else Reason.ContainerConfigError, text)


def _of_child(draft: Draft) -> Iterable[Obstacle]:
    """Pods that could not be created leave no trace but an event of the PyTorchJob."""
    for event in _newest_first(draft.view.observed.events, pytorchjob.CHILD_KIND, draft.current.child):
        if event.get("reason") != "FailedCreatePod":
            continue
        said = clean(str(event.get("message") or ""))
        if initcontainer.NAME in said:
            yield Obstacle(Reason.InitContainerRefused, f"{sentence(said)}; {initcontainer.FIX}")
        else:
            yield Obstacle(Reason.PodsRefused, said)
        return


def _newest_first(events: Iterable[Object], kind: str, name: str) -> list[Object]:
    mine = [e for e in events if _about(e).get("kind") == kind and _about(e).get("name") == name]
    return sorted(mine, key=_seen, reverse=True)


def _about(event: Object) -> Mapping[str, Any]:
    about: Mapping[str, Any] = event.get("involvedObject") or event.get("regarding") or {}
    return about


def _seen(event: Object) -> float:
    series = event.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        event.get("lastTimestamp"),
        event.get("eventTime"),
        event["metadata"].get("creationTimestamp"),
    )
    return next((moment(time) or 0.0 for time in times if time), 0.0)


def overdue(draft: Draft) -> Cause | None:
    """Return the cause StartTimeout if pods have waited too long since admission; else request a pass for then."""
    if draft.current.running_time is not None or draft.status.admitted_since is None:
        return None
    limit = draft.view.spec.run_policy.start_timeout_seconds
    left = limit - limits.starting_seconds(draft)
    if left > 0:
        draft.wake_in(left)
        return None
    hit = obstacle(draft)
    pods, nodes = draft.pods, draft.view.spec.resources.nodes
    running = sum(has_run(pod) for pod in pods)
    why = hit.message if hit is not None else f"{len(pods)} of {nodes} pods exist"
    when = "after admission" if not draft.status.starting_seconds else "after the first of several admissions"
    text = f"{running} of {nodes} pods were running {limit} s {when} (runPolicy.startTimeoutSeconds): {why}"
    return Cause(Reason.StartTimeout, clean(text, 2000))


def say(draft: Draft) -> None:
    """Report an attempt that is starting."""
    hit = obstacle(draft)
    if hit is None:
        pods, nodes = draft.pods, draft.view.spec.resources.nodes
        running = sum(has_run(pod) for pod in pods)
        # A thousand pods start one by one; their count is not written a thousand times.
        share = max(1, nodes // 10)
        shown = running if running == nodes else running - running % share
        text = f"{shown} of {nodes} pods are running (attempt {draft.current.number})."
        draft.place("Starting", Reason.Starting, text)
        return
    draft.place("Starting", hit.reason, f"{sentence(hit.message)}.", progressing=not hit.needs_action)
