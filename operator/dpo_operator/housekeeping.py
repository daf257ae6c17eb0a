"""Cleans up after attempts and jobs: PyTorchJobs that are kept for their logs, and the DPOJob's time to live."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_operator import clock
from dpo_operator.backend import pytorchjob
from dpo_operator.config import Settings
from dpo_operator.draft import Draft
from dpo_operator.types import DeleteChild, DeleteJob, Object
from dpo_operator.view import attempt_of


def trim_history(draft: Draft) -> None:
    """Delete all but the newest failed PyTorchJobs, which are kept only for the logs of their pods."""
    stored = draft.view.status
    newest = stored.attempts[-1].number if stored.attempts else 0
    over = stored.completion_time is not None
    results = {attempt.number: attempt for attempt in stored.attempts}
    failed = []
    for child in draft.view.children.values():
        number = attempt_of(child)
        if number is None or child["metadata"].get("deletionTimestamp"):
            continue
        attempt = results.get(number)
        if attempt is not None and (attempt.end_time is None or attempt.result == "Succeeded"):
            continue
        if number < newest or (number == newest and (over or attempt is not None)):
            failed.append((number, child))
    limit = draft.view.spec.run_policy.attempts_history_limit
    for _, child in sorted(failed, key=lambda pair: pair[0], reverse=True)[limit:]:
        draft.act(DeleteChild(str(child["metadata"]["name"]), str(child["metadata"]["uid"])))


def leave_queue(draft: Draft) -> None:
    """Delete a PyTorchJob that is still queued although its job has finished: if admitted, it would run again.

    A job that is preempted just after its export succeeds, but training-operator never sees it succeed.
    """
    for child in draft.view.children.values():
        waits = pytorchjob.is_held(child) and not pytorchjob.is_over(child)
        if waits and not child["metadata"].get("deletionTimestamp"):
            draft.act(DeleteChild(str(child["metadata"]["name"]), str(child["metadata"]["uid"])))


def expire(draft: Draft) -> None:
    """Delete a finished DPOJob after its time to live; garbage collection deletes the objects that it owns."""
    due = expiry(draft.view.observed.job, draft.settings)
    if due is None:
        return
    if draft.now < due:
        draft.wake_at(due)
    else:
        draft.act(DeleteJob(draft.view.name, draft.view.uid))


def expiry(job: Object, settings: Settings) -> float | None:
    """Return when the time to live of a finished DPOJob is over, Unix seconds; None: never.

    A spec that was rejected may be wrong elsewhere: this one field still counts.
    """
    ended = (job.get("status") or {}).get("completionTime")
    spec = job.get("spec")
    policy = spec.get("runPolicy") if isinstance(spec, Mapping) else None
    limit = policy.get("ttlSecondsAfterFinished") if isinstance(policy, Mapping) else None
    if not isinstance(limit, int) or limit < 0:
        limit = settings.default_ttl_seconds_after_finished
    return clock.to_moment(ended) + limit if ended and limit is not None else None
