"""Limits on attempts: the deadline and the start time-out, which count admitted time, and the stall time-out."""

from __future__ import annotations

from dpo_api.status import StatusProgress
from dpo_operator import clock
from dpo_operator.classification import Cause
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason


def admit(draft: Draft) -> None:
    """Start counting admitted time: the attempt holds nodes, or may hold some."""
    if draft.status.admitted_since is None:
        draft.update(admitted_since=draft.moment)


def release(draft: Draft) -> None:
    """Stop counting admitted time: the attempt is queued or over."""
    if draft.status.admitted_since is None:
        return
    attempt = draft.attempt
    if attempt is not None and attempt.running_time is None:
        # A step shows that all pods ran, although the operator did not see it.
        draft.update(starting_seconds=None if attempt.last_step else int(starting_seconds(draft)))
    draft.update(admitted_since=None, admitted_seconds=int(admitted_seconds(draft)))


def admitted_seconds(draft: Draft) -> float:
    """Return the total seconds for which the job has been admitted."""
    return (draft.status.admitted_seconds or 0) + _since_admission(draft)


def starting_seconds(draft: Draft) -> float:
    """Return the seconds for which attempts have been admitted since one last had all its pods running.

    Attempts that end before that do not begin the count again: on cold nodes each would fail the same way. Time in a
    queue, while suspended and between attempts is not counted.
    """
    attempt = draft.attempt
    if attempt is None or attempt.running_time is not None:
        return 0.0
    return (draft.status.starting_seconds or 0) + _since_admission(draft)


def start_timed_out(draft: Draft) -> bool:
    """Whether the attempts of a job that does not start have used up the start time-out."""
    return starting_seconds(draft) >= draft.view.spec.run_policy.start_timeout_seconds


def _since_admission(draft: Draft) -> float:
    since = draft.status.admitted_since
    return max(0.0, draft.now - clock.to_moment(since)) if since is not None else 0.0


def used_up(draft: Draft) -> bool:
    """Whether the job has been admitted for as long as its deadline allows."""
    limit = draft.view.spec.run_policy.active_deadline_seconds
    return limit is not None and admitted_seconds(draft) >= limit


def deadline(draft: Draft) -> Cause | None:
    """Return the cause DeadlineExceeded once the admitted time is used up; otherwise request a pass for then."""
    limit = draft.view.spec.run_policy.active_deadline_seconds
    if limit is None or draft.status.admitted_since is None:
        return None
    left = limit - admitted_seconds(draft)
    if left > 0:
        draft.wake_in(left)
        return None
    return Cause(Reason.DeadlineExceeded, f"the job was active for {limit} s (runPolicy.activeDeadlineSeconds)")


def is_counted(progress: StatusProgress) -> bool:
    """Whether the phase counts units, so that a stall is visible. Loading, checkpoints and exports do not."""
    return progress.phase == "train" or (progress.done is not None and progress.done != progress.of)


def stall(draft: Draft) -> Cause | None:
    """Return the cause Stalled if a trainer that answers has made no progress for too long."""
    limit = draft.view.spec.run_policy.stall_timeout_seconds
    running, progress = draft.current.running_time, draft.status.progress
    if limit is None or running is None or progress is None or progress.changed_at is None:
        return None
    if not is_counted(progress):
        return None
    seen = progress.observed_at
    # Progress of an earlier attempt says nothing about this one.
    if seen is None or clock.to_moment(seen) < clock.to_moment(running):
        return None
    start = max(clock.to_moment(progress.changed_at), clock.to_moment(running))
    still = clock.to_moment(seen) - start
    if still < limit:
        return None
    text = f"no progress for {int(still)} s in phase {progress.phase}, step {progress.step}, while the trainer answered"
    return Cause(Reason.Stalled, text)
