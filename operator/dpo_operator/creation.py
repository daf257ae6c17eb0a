"""Between attempts: wait until the last one is over, and create the next PyTorchJob, whose name is deterministic."""

from __future__ import annotations

from dataclasses import replace

from dpo_api.status import Attempt, ConditionType, State
from dpo_operator import (
    clock,
    conditions,
    evidence,
    invariants,
    labels,
    limits,
    names,
    network,
    obstacles,
    pinning,
    restarts,
)
from dpo_operator.backend import pytorchjob
from dpo_operator.backend.launch import FIRST
from dpo_operator.config import Settings
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason
from dpo_operator.types import CreateChild, Object
from dpo_operator.view import attempt_of, is_alive, moment

RETRY_SECONDS = 60.0
"""Delay before the next try after a refusal by the API server."""
NAMESAKE_SECONDS = 10.0


def adopt(draft: Draft) -> None:
    """Add an attempt whose PyTorchJob exists but whose status write was lost."""
    known = draft.attempt.number if draft.attempt is not None else 0
    for child in sorted(draft.view.children.values(), key=lambda c: attempt_of(c) or 0):
        number = attempt_of(child)
        if number is not None and number > known:
            created = moment(child["metadata"].get("creationTimestamp")) or draft.now
            former = draft.attempt
            if former is not None and former.end_time is None:  # a status was lost: how it ended is unknown
                draft.change_attempt(
                    result="Failed",
                    failure_class="infrastructure",
                    reason=Reason.PodVanished.value,
                    end_time=clock.to_text(created),
                )
            _begin(draft, number, str(child["metadata"]["name"]), created)
            if not pytorchjob.is_held(child) and draft.status.admitted_since is None:
                draft.update(admitted_since=clock.to_text(created))
            known = number


def _settings(draft: Draft) -> Settings:
    """Return the settings that the job's image understands.

    An image of the first launch contract serves its metrics by plain HTTP only: a probe by HTTPS would fail.
    """
    if pinning.launch(draft).contract != FIRST:
        return draft.settings
    return replace(draft.settings, trainer_metrics_secret="")


def _begin(draft: Draft, number: int, child: str, created: float) -> None:
    reached = draft.status.checkpoint_step or 0
    attempt = Attempt(number=number, child=child, start_time=clock.to_text(created), from_step=reached)
    draft.add_attempt(attempt)
    invariants.withdraw(draft)  # an attempt whose end was not observed
    _resume(draft)  # an adopted child of a job that was resumed is the only trace of it
    draft.update(next_attempt_time=None, start_time=draft.status.start_time or clock.to_text(created))


def _resume(draft: Draft) -> None:
    if conditions.holds(draft.status.conditions, ConditionType.Suspended):
        draft.condition(ConditionType.Suspended, "False", Reason.Resumed, "runPolicy.suspend is false again.")


def between(draft: Draft) -> None:
    """Suspend, wait, or create the next attempt's PyTorchJob."""
    last = draft.attempt
    if draft.view.spec.run_policy.suspend:
        suspended(draft)
        return
    _resume(draft)
    if last is not None and (_waits(draft) or restarts.out_of_time(draft)):
        return
    number = 1 if last is None else last.number + 1
    name = names.child(draft.view.name, number)
    if _blocked(draft, name) or not _pinned(draft):
        return
    body = pytorchjob.build_child(
        draft.view.job,
        draft.view.identity,
        number,
        str(draft.status.image),
        _settings(draft),
        evidence.broken_nodes(draft.status.attempts),
        pinning.launch(draft),
    )
    obstacle = network.create(draft)
    if obstacle is not None:
        draft.place(_before(draft), *obstacle, progressing=False)
        draft.wake_in(RETRY_SECONDS)
        return
    draft.act(CreateChild(body))
    _begin(draft, number, name, draft.now)
    queue = body["metadata"]["labels"].get(labels.KUEUE_QUEUE)
    if queue is not None:
        draft.place("Queued", Reason.Queued, f"Waiting for queue {queue} (attempt {number}).")
        return
    limits.admit(draft)
    nodes = draft.view.spec.resources.nodes
    draft.place("Starting", Reason.Starting, f"0 of {nodes} pods are running (attempt {number}).")


def suspended(draft: Draft) -> None:
    """Report that the job is suspended and holds no nodes."""
    limits.release(draft)
    reached = draft.status.checkpoint_step
    start = f"the checkpoint of step {reached}" if reached else "the newest checkpoint, if there is one"
    text = f"runPolicy.suspend is true. Set it to false to continue from {start}."
    draft.update(next_attempt_time=None)
    draft.place("Suspended", Reason.Suspended, text, progressing=False)
    draft.condition(ConditionType.Suspended, "True", Reason.Suspended, text)


def _waits(draft: Draft) -> bool:
    """Whether the next attempt must wait for the end of the last one or for the back-off."""
    stored = draft.view.stored_attempt(draft.current.number)
    if stored is None or stored.end_time is None:
        draft.wake_in(0)  # the status must first record how the last one ended
        return True
    due = draft.status.next_attempt_time
    left = clock.to_moment(due) - draft.now if due is not None else 0.0
    # More than the longest back-off means that the clock was set back: treat the back-off as over.
    if 0 < left <= restarts.longest_pause(draft.settings):
        draft.wake_in(left)
        return True
    return False


def _blocked(draft: Draft, name: str) -> bool:
    """Whether something outside the job prevents the PyTorchJob; if so, report it."""
    view = draft.view
    if not view.observed.backend_installed:
        text = "The cluster has no PyTorchJob resource: install training-operator v1. The job then continues by itself."
        draft.place(_before(draft), Reason.PyTorchJobMissing, text, progressing=False)
        draft.wake_in(RETRY_SECONDS)
        return True
    refusal = view.observed.refusals.get(name)
    if refusal is not None:
        draft.place(_before(draft), *obstacles.refused("PyTorchJob", name, refusal), progressing=False)
        draft.wake_in(RETRY_SECONDS)
        return True
    stranger = view.strangers.get(name)
    if stranger is not None:
        _refuse_stranger(draft, name, ending=bool(stranger["metadata"].get("deletionTimestamp")))
        return True
    mine = {*pytorchjob.expected_pods(name, view.spec.resources.nodes)}
    ghosts = [pod for pod in view.namesake_pods if pod["metadata"]["name"] in mine]
    # Pods of an earlier DPOJob usually write to the same run directory: none may run beside the new ones.
    ghosts += [pod for pod in view.namesake_pods if is_alive(pod) and not pod_is_given_up(draft, pod)]
    if ghosts:
        text = f"Pod {ghosts[0]['metadata']['name']} of a deleted DPOJob with the same name still exists."
        draft.place(_before(draft), Reason.WaitingForNamesake, text)
        draft.wake_in(NAMESAKE_SECONDS)
        return True
    return False


def lacks_spec(draft: Draft) -> bool:
    """Whether the pods of a starting attempt wait for a ConfigMap that cannot be made again; if so, report why.

    One that was deleted is made again, and the pods start.
    """
    name = str(draft.status.config_map)
    waits = (event for event in draft.view.observed.events if event.get("reason") == "FailedMount")
    return any(name in str(event.get("message") or "") for event in waits) and not _pinned(draft)


def _pinned(draft: Draft) -> bool:
    """Whether the ConfigMap with the accepted spec is there or is created in this pass; if not, report why."""
    name = str(draft.status.config_map)
    if draft.attempt is not None and not pinning.is_known(draft, name):  # before the first attempt there is none
        return False
    if draft.attempt is None and pinning.adopt(draft):
        draft.follow()  # the PyTorchJob must not be created before the status names what it runs
        return False
    obstacle = pinning.ensure(draft, name)
    if obstacle is not None:
        draft.place(_before(draft), *obstacle, progressing=False)
        draft.wake_in(RETRY_SECONDS)
    return obstacle is None


def _before(draft: Draft) -> State:
    """Return the state of a job whose next attempt cannot be created yet."""
    return "Restarting" if draft.attempt is not None else "Pending"


def pod_is_given_up(draft: Draft, pod: Object) -> bool:
    """Whether a pod that is being deleted counts as gone: its node has not responded since its grace period ended.

    ``deletionTimestamp`` is when the grace period ends. A kubelet that answers would have removed the pod by then.
    """
    due = moment(pod["metadata"].get("deletionTimestamp"))
    if due is None:
        return False
    limit = due + draft.settings.unreachable_margin_seconds
    if draft.now < limit:
        draft.wake_at(limit)
        return False
    return True


def _refuse_stranger(draft: Draft, name: str, *, ending: bool) -> None:
    owners = draft.view.strangers[name]["metadata"].get("ownerReferences") or []
    namesake = any(owner.get("kind") == "DPOJob" and owner.get("name") == draft.view.name for owner in owners)
    if ending or namesake:
        text = f"PyTorchJob {name} of a deleted DPOJob with the same name is still terminating."
        draft.place(_before(draft), Reason.WaitingForNamesake, text)
    else:
        text = f"PyTorchJob {name} already exists and belongs to another owner: rename or delete it."
        draft.place(_before(draft), Reason.ChildNameTaken, text, progressing=False)
    draft.wake_in(NAMESAKE_SECONDS)
