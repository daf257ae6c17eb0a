"""The life of one attempt: it is created, runs, ends by itself or by the operator, and is over with its last pod.

Nothing is deleted, and no next attempt is created, before the stored status says that the attempt has ended. A pass
that is lost between two calls is repeated with the same result.
"""

from __future__ import annotations

from dpo_api.status import ConditionType
from dpo_operator import (
    creation,
    ends,
    evidence,
    imageids,
    invariants,
    limits,
    network,
    progress,
    restarts,
    starting,
)
from dpo_operator.backend import pytorchjob
from dpo_operator.classification import Cause, decisive, success
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason, named
from dpo_operator.texts import sentence
from dpo_operator.types import DeleteChild, LookUpChild, Object
from dpo_operator.view import is_alive


def step(draft: Draft) -> None:
    """Bring the job's newest attempt one step further, or create the next one."""
    creation.adopt(draft)
    if draft.attempt is not None and draft.current.result is None:
        network.cover(draft)
        _active(draft)
    if draft.attempt is None or draft.current.end_time is not None:
        creation.between(draft)
    elif draft.current.result is not None:
        _ending(draft)


def _active(draft: Draft) -> None:
    """Check an attempt that was active at the last pass; it may have ended since."""
    child = draft.child
    if child is None:
        if not draft.view.is_gone(draft.current.child):
            draft.act(LookUpChild(draft.current.child))
            return
        evidence.record(draft)
        _fail(draft, _deleted(draft))
        return
    held = pytorchjob.is_held(child) and not pytorchjob.is_over(child)
    if not held:  # the pods of a preempted admission say nothing about the next one
        evidence.record(draft)
    words = success(draft.pods)
    if words is not None:
        draft.change_attempt(result="Succeeded", reason=Reason.Succeeded.value, last_step=words.step)
        return
    cause = _failure(draft, child)
    if cause is not None:
        _fail(draft, cause)
        return
    if draft.view.spec.run_policy.suspend:
        text = "runPolicy.suspend was set"
        draft.change_attempt(result="Stopped", reason=Reason.Suspended.value, message=text)
        return
    if held:
        _queue(draft, child)
        return
    limits.admit(draft)
    if draft.current.running_time is None and starting.started(draft):
        draft.change_attempt(running_time=draft.moment, image_ids=imageids.of_pods(draft.pods))
        draft.update(starting_seconds=None)
        evidence.record(draft)
    progress.apply(draft)
    invariants.apply(draft)
    _watch(draft)


def _watch(draft: Draft) -> None:
    """Enforce the limits of an admitted attempt and report where it is."""
    cause = limits.deadline(draft) or starting.overdue(draft) or limits.stall(draft)
    if cause is not None:
        if cause.reason is Reason.StartTimeout:
            evidence.record_stuck(draft)
        _fail(draft, cause)
    elif draft.current.running_time is None:
        if not creation.lacks_spec(draft):
            starting.say(draft)
    else:
        seen = draft.status.progress
        fresh = seen is not None and (seen.observed_at or "") >= draft.current.running_time
        draft.place("Running", Reason.Running, progress.sentence(seen if fresh else None))


def _failure(draft: Draft, child: Object) -> Cause | None:
    """Return the cause of an attempt that has failed by itself."""
    if pytorchjob.has_failed(child):
        return evidence.explain(draft)
    if child["metadata"].get("deletionTimestamp"):
        return _deleted(draft)
    if pytorchjob.has_succeeded(child):
        found = decisive(evidence.causes(draft))
        return found or Cause(
            Reason.FinalWordsLost, "the PyTorchJob succeeded, but rank 0's termination message is missing"
        )
    return None


def _deleted(draft: Draft) -> Cause:
    found = decisive(evidence.causes(draft))
    # Pods that end because their PyTorchJob was deleted report a deletion or a stop. Anything decisive came first.
    if found is not None and found.is_decisive:
        return found
    return Cause(Reason.ChildDeleted, f"PyTorchJob {draft.current.child} was deleted, but not by the operator")


def _fail(draft: Draft, cause: Cause) -> None:
    draft.change_attempt(
        result="Failed",
        failure_class=cause.failure_class,
        reason=cause.reason.value,
        message=cause.message[:4000],
    )


def _queue(draft: Draft, child: Object) -> None:
    """Handle a PyTorchJob that its queue holds, from the start or after a preemption: no limit runs."""
    _release(draft)
    if draft.current.running_time is not None or draft.current.pods:
        draft.change_attempt(running_time=None, pods=(), pods_omitted=None)
    queue = pytorchjob.queue_of_child(child)
    where = f"queue {queue}" if queue else "its queue"
    draft.place("Queued", Reason.Queued, f"Waiting for {where} (attempt {draft.current.number}).")


def _release(draft: Draft) -> None:
    """Note that the attempt no longer holds nodes."""
    limits.release(draft)
    invariants.withdraw(draft)


def _ending(draft: Draft) -> None:
    """Wait until an attempt holds nothing any more, refining its cause meanwhile; then decide what follows."""
    if not draft.current.image_ids:  # not all of its pods have run, but some may have
        draft.change_attempt(image_ids=imageids.of_pods(draft.pods))
    if draft.current.result != "Succeeded":
        evidence.record(draft)
        evidence.steps(draft)
        evidence.last_values(draft)
        evidence.exported(draft)
        _refine(draft)
        words = success(draft.pods)
        if words is not None:  # it finished while it was being ended
            draft.change_attempt(
                result="Succeeded",
                failure_class=None,
                reason=Reason.Succeeded.value,
                message=None,
                last_step=words.step,
            )
    if draft.current.result == "Succeeded":
        words = success(draft.pods)
        draft.change_attempt(end_time=draft.moment)
        _release(draft)
        if words is not None:
            ends.succeed(draft, words)
        return
    must_go = named(draft.current.reason).ended_by_operator or (
        draft.child is not None and not pytorchjob.is_over(draft.child)
    )
    if must_go and not _torn_down(draft):
        _place_ending(draft)
        return
    if [pod for pod in draft.pods if is_alive(pod) and not creation.pod_is_given_up(draft, pod)]:
        _place_ending(draft)
        return
    draft.change_attempt(end_time=draft.moment)
    _release(draft)
    restarts.conclude(draft)
    if draft.status.completion_time is None and draft.current.result == "Stopped":
        creation.between(draft)
    draft.wake_in(0)


def _refine(draft: Draft) -> None:
    """Record a better cause: the one that explains the attempt may show only when the last pod has ended."""
    best = decisive(evidence.causes(draft))
    if best is not None and best.outranks(named(draft.current.reason)):
        _fail(draft, best)


def _torn_down(draft: Draft) -> bool:
    """Delete the PyTorchJob of an attempt that the operator ends; return whether it is gone."""
    attempt, child = draft.current, draft.child
    if child is None:
        if draft.view.is_gone(attempt.child):
            return True
        draft.act(LookUpChild(attempt.child))
        return False
    stored = draft.view.stored_attempt(attempt.number)
    if stored is None or stored.result is None:
        draft.wake_in(0)  # the reason must be in the stored status before anything is deleted
    elif not child["metadata"].get("deletionTimestamp"):
        draft.act(DeleteChild(attempt.child, str(child["metadata"]["uid"])))
    return False


def _place_ending(draft: Draft) -> None:
    """Report what an attempt that is being ended waits for."""
    attempt = draft.current
    draft.wake_in(draft.settings.resync_seconds)
    said = sentence(attempt.message or attempt.reason or "the operator stopped it")
    grace = draft.view.spec.checkpoint.grace_period_seconds
    if attempt.reason == Reason.Suspended.value or attempt.failure_class == "permanent":
        text = f"Stopping attempt {attempt.number} ({said}). Its pods have up to {grace} s to write a checkpoint."
        draft.place("Checkpointing", Reason.Checkpointing, text)
    else:
        text = f"Attempt {attempt.number} ended ({attempt.reason}): {said}. Waiting for its last pods to terminate."
        draft.place("Restarting", Reason.Restarting, text)
    if draft.view.spec.run_policy.suspend and attempt.result == "Stopped":
        draft.condition(ConditionType.Suspended, "False", Reason.Checkpointing, "Writing a checkpoint.")
