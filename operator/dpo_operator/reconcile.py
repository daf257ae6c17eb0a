"""``reconcile``: one pure function from observations to actions. Each policy has its own module."""

from __future__ import annotations

from dpo_api.findings import ManifestError
from dpo_operator import acceptance, attempts, clock, conditions, events, housekeeping, labels, patches, retry, size
from dpo_operator.backend import pytorchjob
from dpo_operator.config import Settings
from dpo_operator.draft import Draft
from dpo_operator.types import (
    CheckChild,
    Decision,
    DeleteJob,
    LookUpChild,
    LookUpConfigMap,
    Observed,
    PatchStatus,
    ScrapeTarget,
)
from dpo_operator.view import View, is_alive

WRITE_SECONDS = 1.0
"""Least time between two writes of a job's status, where nothing waits for the second."""


def reconcile(observed: Observed, now: float, settings: Settings) -> Decision:
    """Decide what to do about one DPOJob. ``now``: Unix seconds. Pure: equal arguments give equal decisions.

    Raises pydantic's ValidationError for a stored status of a form that no operator writes.
    """
    view = View.of(observed)
    if view.metadata.get("deletionTimestamp"):  # garbage collection deletes what it owns; there is no finalizer
        return Decision(status=patches.to_json(view.status))
    draft = Draft(view, now, settings)
    _decide(draft)
    draft.update(observed_generation=view.generation)
    if acceptance.is_accepted(draft):  # until then a rejection applies to the generation that was checked
        draft.update(conditions=conditions.observed_for(draft.status.conditions, view.generation))
    return _conclude(draft)


def _decide(draft: Draft) -> None:
    if draft.view.status.completion_time is not None:
        if acceptance.is_corrected(draft):
            acceptance.reopen(draft)
        elif draft.view.is_readable and retry.is_due(draft):
            retry.start(draft)
            return
        else:
            _clean_up(draft)
            return
    try:
        _ = draft.view.spec
    except ManifestError as error:
        acceptance.unreadable(draft, error)
        return
    retry.note(draft)
    if acceptance.is_newer(draft) or not acceptance.accept(draft):
        return
    attempts.step(draft)
    draft.update(queue=_queue(draft))
    housekeeping.trim_history(draft)
    if draft.status.completion_time is not None:
        draft.wake_in(0)
    else:
        draft.wake_in(draft.settings.resync_seconds)


def _clean_up(draft: Draft) -> None:
    """What is left to do for a job that has ended."""
    if draft.view.is_readable:
        housekeeping.leave_queue(draft)
        housekeeping.trim_history(draft)
        housekeeping.expire(draft)
    elif not acceptance.is_accepted(draft):  # accepted, it is one of a newer operator, which this one does not touch
        housekeeping.expire(draft)


def _queue(draft: Draft) -> str | None:
    """Return the queue of the current PyTorchJob, which an edit of the job does not move; else the next one's."""
    if draft.status.completion_time is not None:
        return draft.status.queue
    attempt = draft.attempt
    child = draft.view.children.get(attempt.child) if attempt is not None and attempt.end_time is None else None
    if child is not None:
        return pytorchjob.queue_of_child(child)
    return pytorchjob.queue_of(draft.view.job, draft.view.identity, draft.settings)


def _conclude(draft: Draft) -> Decision:
    """Put actions, events and the status patch in order."""
    view = draft.view
    scrape = _target(draft)
    asks = any(isinstance(action, CheckChild | LookUpChild | LookUpConfigMap) for action in draft.actions)
    if asks or _is_progress_alone(draft):  # the answer comes first; what was drafted without it is dropped
        return Decision(tuple(draft.actions), patches.to_json(view.status), draft.wake, scrape)
    emitted = events.emit(draft)
    if any(isinstance(action, DeleteJob) for action in draft.actions):
        return Decision((*emitted, *draft.actions), patches.to_json(view.status), draft.wake, scrape)
    if view.status.completion_time is None:  # the status of an ended job no longer grows
        draft.status = size.fit(draft.status, view.observed.status_limit)
    after = patches.to_json(draft.status)
    patch = patches.difference(patches.to_json(view.status), after)
    written = []
    if patch:
        version = view.metadata.get("resourceVersion")
        written.append(PatchStatus({"metadata": {"resourceVersion": version}, "status": patch}))
    left = _left(draft) if patch else 0.0
    if left > 0:
        wake = left if draft.wake is None else min(left, draft.wake)
        return Decision(tuple(draft.actions), patches.to_json(view.status), wake, scrape, delayed=True)
    if draft.follows:  # what the next round creates does not wait for the events
        actions = (*draft.actions, *written)
        return Decision(actions, after, draft.wake, scrape, follow=True, later=tuple(emitted))
    return Decision((*draft.actions, *emitted, *written), after, draft.wake, scrape)


def _left(draft: Draft) -> float:
    """Return the seconds for which the status write can wait, so that one write tells what several would.

    A job that starts changes several times within a second, and each write costs the API server milliseconds. A write
    waits only if the last one was just before, if no further step needs it, and if all pods are well: what shows why an
    attempt ends may be gone a moment later. An attempt whose PyTorchJob exists is found again by its name.
    """
    written = draft.view.observed.written
    if written is None or not 0 <= draft.now - written < WRITE_SECONDS:
        return 0.0
    former = {attempt.number: attempt.result for attempt in draft.view.status.attempts}
    ended = any(attempt.result != former.get(attempt.number) for attempt in draft.status.attempts)
    ending = draft.attempt is not None and draft.attempt.result is not None
    over = draft.view.status.completion_time is not None or draft.status.completion_time is not None
    well = all(is_alive(pod) and not pod["metadata"].get("deletionTimestamp") for pod in draft.view.observed.pods)
    if ended or ending or over or not well or draft.follows or draft.wake == 0:
        return 0.0
    return written + WRITE_SECONDS - draft.now


def _is_progress_alone(draft: Draft) -> bool:
    """Whether the pass changes only the progress, and that was written recently."""
    former = draft.view.status.progress
    if former is None or former.observed_at is None:
        return False
    age = draft.now - clock.to_moment(former.observed_at)
    if not 0 <= age < draft.settings.progress_write_seconds:  # below 0 the clock was set back
        return False
    return patches.without_progress(draft.view.status) == patches.without_progress(draft.status)


def _target(draft: Draft) -> ScrapeTarget | None:
    """Return rank 0's pod of the current attempt while it runs."""
    attempt = draft.attempt
    if attempt is None or attempt.result is not None or draft.status.completion_time is not None:
        return None
    for pod in draft.view.pods(attempt):
        status = pod.get("status") or {}
        running = status.get("phase") == "Running" and status.get("podIP") and is_alive(pod)
        if pytorchjob.is_rank_zero(pod) and running and not pod["metadata"].get("deletionTimestamp"):
            return ScrapeTarget(
                child=attempt.child,
                namespace=draft.view.identity.namespace or "default",
                pod=str(pod["metadata"]["name"]),
                ip=str(status["podIP"]),
                port=draft.settings.trainer_port,
                https=(pod["metadata"].get("labels") or {}).get(labels.METRICS) == labels.HTTPS,
            )
    return None
