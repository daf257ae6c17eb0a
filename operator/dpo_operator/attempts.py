"""The life of one attempt: created, seen running, ended by itself or by us, over when its last pod is.

Nothing is destroyed, and no next attempt created, before the stored status says that the attempt has ended: a pass
that is lost between two calls is repeated and comes to the same.
"""

from __future__ import annotations

from dpo_api.status import Attempt, ConditionType
from dpo_operator import creation, ends, evidence, invariants, limits, progress, restarts, starting
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
    attempt = draft.attempt
    if attempt is not None and attempt.result is None:
        _active(draft, attempt)
        attempt = draft.attempt
    if attempt is None or attempt.end_time is not None:
        creation.between(draft)
    elif attempt.result is not None:
        _ending(draft, attempt)


def _active(draft: Draft, attempt: Attempt) -> None:
    """Look at an attempt that has not ended; it may turn out to have."""
    child = draft.view.children.get(attempt.child)
    if child is None:
        if not draft.view.is_gone(attempt.child):
            draft.act(LookUpChild(attempt.child))
            return
        evidence.record(draft, attempt, None)
        _fail(draft, _deleted(draft))
        return
    held = pytorchjob.is_held(child) and not pytorchjob.is_over(child)
    if not held:  # the pods of a preempted admission say nothing about the next one
        evidence.record(draft, attempt, child)
    current = draft.attempt or attempt
    words = success(draft.view.pods(current))
    if words is not None:
        draft.change_attempt(result="Succeeded", reason=Reason.Succeeded.value, last_step=words.step)
        return
    cause = _failure(draft, current, child)
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
    if current.running_time is None and starting.started(draft, current):
        draft.change_attempt(running_time=draft.moment)
        evidence.record(draft, draft.attempt or current, child)
    progress.apply(draft)
    invariants.apply(draft)
    _watch(draft, draft.attempt or current)


def _watch(draft: Draft, attempt: Attempt) -> None:
    """Hold an admitted attempt to its limits and say where it is."""
    cause = limits.deadline(draft) or starting.overdue(draft, attempt) or limits.stall(draft, attempt)
    if cause is not None:
        if cause.reason is Reason.StartTimeout:
            evidence.record_stuck(draft, attempt)
        _fail(draft, cause)
    elif attempt.running_time is None:
        starting.say(draft, attempt)
    else:
        seen = draft.status.progress
        fresh = seen is not None and (seen.observed_at or "") >= attempt.running_time
        draft.place("Running", Reason.Running, progress.sentence(seen if fresh else None))


def _failure(draft: Draft, attempt: Attempt, child: Object) -> Cause | None:
    """Return the cause of an attempt that has failed by itself."""
    if pytorchjob.has_failed(child):
        return evidence.explain(draft, attempt, child)
    if child["metadata"].get("deletionTimestamp"):
        return _deleted(draft)
    if pytorchjob.has_succeeded(child):
        found = decisive(evidence.causes(draft, attempt, child))
        return found or Cause(
            Reason.FinalWordsLost, "training-operator says Succeeded, rank 0's last words are not there"
        )
    return None


def _deleted(draft: Draft) -> Cause:
    attempt = draft.attempt
    assert attempt is not None  # noqa: S101 - the caller looked at one
    found = decisive(evidence.causes(draft, attempt, None))
    # Pods that end because their child was deleted tell of a deletion or a stop; anything more telling came first.
    if found is not None and found.weakness < 10:
        return found
    return Cause(Reason.ChildDeleted, f"PyTorchJob {attempt.child} was deleted by somebody else")


def _fail(draft: Draft, cause: Cause) -> None:
    draft.change_attempt(
        result="Failed",
        failure_class="permanent" if cause.reason is Reason.DeadlineExceeded else cause.failure_class,
        reason=cause.reason.value,
        message=cause.message[:4000],
    )


def _queue(draft: Draft, child: Object) -> None:
    """A child that its queue holds, from the start or after a preemption: nothing counts, nothing is due."""
    _release(draft)
    if draft.attempt is not None and (draft.attempt.running_time is not None or draft.attempt.pods):
        draft.change_attempt(running_time=None, pods=())
    queue = pytorchjob.queue_of_child(child)
    where = f"queue {queue}" if queue else "its queue"
    number = draft.attempt.number if draft.attempt is not None else 1
    draft.place("Queued", Reason.Queued, f"Waits for {where} (attempt {number}).")


def _release(draft: Draft) -> None:
    """The attempt holds no nodes any more."""
    limits.release(draft)
    invariants.withdraw(draft)


def _ending(draft: Draft, attempt: Attempt) -> None:
    """Wait until an attempt holds nothing any more, refine its cause meanwhile, then decide what follows."""
    child = draft.view.children.get(attempt.child)
    if attempt.result != "Succeeded":
        evidence.record(draft, attempt, child)
        evidence.steps(draft, draft.attempt or attempt)
        evidence.last_values(draft, draft.attempt or attempt)
        _refine(draft, child)
        attempt = draft.attempt or attempt
        words = success(draft.view.pods(attempt))
        if words is not None:  # it finished while it was being ended
            draft.change_attempt(
                result="Succeeded",
                failure_class=None,
                reason=Reason.Succeeded.value,
                message=None,
                last_step=words.step,
            )
            attempt = draft.attempt or attempt
    if attempt.result == "Succeeded":
        words = success(draft.view.pods(attempt))
        draft.change_attempt(end_time=draft.moment)
        _release(draft)
        if words is not None:
            ends.succeed(draft, words)
        return
    must_go = attempt.reason in evidence.OURS or (child is not None and not pytorchjob.is_over(child))
    if must_go and not _torn_down(draft, attempt, child):
        _place_ending(draft, attempt)
        return
    alive = [pod for pod in draft.view.pods(attempt) if is_alive(pod) and not creation.pod_is_given_up(draft, pod)]
    if alive:
        _place_ending(draft, attempt)
        return
    attempt = draft.change_attempt(end_time=draft.moment)
    _release(draft)
    restarts.conclude(draft, attempt)
    if draft.status.completion_time is None and attempt.result == "Stopped":
        creation.between(draft)
    draft.wake_in(0)


def _refine(draft: Draft, child: Object | None) -> None:
    """A more decisive cause may show only when the last pod has ended.

    Of an attempt that the operator ends only a permanent cause changes the story: it would come again.
    """
    attempt = draft.attempt
    assert attempt is not None  # noqa: S101 - the caller has one in hand
    best = decisive(evidence.causes(draft, attempt, child))
    told = named(attempt.reason)
    if told.value in evidence.OURS:
        known = 1
    elif told is Reason.ChildDeleted:
        known = 10  # that pods stop says nothing more than that their child was deleted
    else:
        known = Cause(told, "").weakness
    if best is not None and best.weakness < known:
        _fail(draft, best)


def _torn_down(draft: Draft, attempt: Attempt, child: Object | None) -> bool:
    """Delete the child of an attempt that the operator ends; whether it is gone."""
    if child is None:
        if draft.view.is_gone(attempt.child):
            return True
        draft.act(LookUpChild(attempt.child))
        return False
    stored = draft.view.stored_attempt(attempt.number)
    if stored is None or stored.result is None:
        draft.wake_in(0)  # first the status must remember why
    elif not child["metadata"].get("deletionTimestamp"):
        draft.act(DeleteChild(attempt.child, str(child["metadata"]["uid"])))
    return False


def _place_ending(draft: Draft, attempt: Attempt) -> None:
    """Say what an attempt that is being ended waits for."""
    draft.wake_in(draft.settings.resync_seconds)
    said = sentence(attempt.message or attempt.reason or "it was asked to")
    grace = draft.view.spec.checkpoint.grace_period_seconds
    if attempt.reason == Reason.Suspended.value or attempt.failure_class == "permanent":
        text = f"Attempt {attempt.number} ends ({said}); its pods have up to {grace} s to write a checkpoint."
        draft.place("Checkpointing", Reason.Checkpointing, text)
    else:
        text = f"Attempt {attempt.number} ended ({attempt.reason}): {said}. Its last pods are ending."
        draft.place("Restarting", Reason.Restarting, text)
    if draft.view.spec.run_policy.suspend and attempt.result == "Stopped":
        draft.condition(ConditionType.Suspended, "False", Reason.Checkpointing, "A checkpoint is being written.")
