"""Whether another attempt follows, and when: a budget for each class of failure, and exponential back-off."""

from __future__ import annotations

import hashlib

from dpo_api.status import Attempt
from dpo_operator import clock, ends, limits
from dpo_operator.config import Settings
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason, named
from dpo_operator.texts import sentence

JITTER = 0.1
"""Share of the back-off by which jobs that failed together are spread."""


SILENT_SECONDS = 3600.0
"""An attempt that ran for longer without ever reporting progress is assumed to have made some."""


def without_progress(draft: Draft) -> int:
    """Return the number of consecutive failures without a new checkpoint, this one included, since a retry."""
    reached = draft.status.checkpoint_step
    grace = draft.view.spec.checkpoint.grace_period_seconds
    count = 0
    for attempt in reversed(draft.status.attempts):
        if attempt.number <= (draft.status.retried_attempt or 0):
            break
        if attempt.result != "Failed" or (reached or 0) > (attempt.from_step or 0) or _ran_silently(attempt, grace):
            break
        count += 1
    return count


def _ran_silently(attempt: Attempt, grace: int) -> bool:
    """Whether an attempt ran for long without a report: scraping may be off, and its termination message lost."""
    if attempt.last_step is not None or attempt.running_time is None or attempt.end_time is None:
        return False
    return clock.to_moment(attempt.end_time) - clock.to_moment(attempt.running_time) > SILENT_SECONDS + grace


def backoff(failures: int, key: str, settings: Settings) -> float:
    """Return the seconds before the next attempt after this many consecutive failures.

    The spread is a hash of ``key``, not random, so that a repeated pass gives the same result.
    """
    pause = min(settings.backoff_max_seconds, settings.backoff_base_seconds * 2.0 ** min(max(0, failures - 1), 32))
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
    return pause * (1 + JITTER * share)


def longest_pause(settings: Settings) -> float:
    """Return the most that ``backoff`` gives, and the second to which a moment is rounded up."""
    return settings.backoff_max_seconds * (1 + JITTER) + 1


def is_charged(draft: Draft) -> bool:
    """Whether the newest attempt, which failed, counts against runPolicy.maxRestarts."""
    attempt = draft.current
    if attempt.reason in Reason.__members__:
        charged = named(attempt.reason).charged
        return charged == "always" or (charged == "after start time-out" and limits.start_timed_out(draft))
    return attempt.failure_class == "retryable"  # a newer operator recorded a reason that this one does not know


def conclude(draft: Draft) -> None:
    """Decide what follows an attempt that is over and did not succeed."""
    attempt = draft.current
    if attempt.result == "Stopped":
        draft.update(next_attempt_time=None)
        return
    reason = named(attempt.reason)
    said = sentence(attempt.message or reason.meaning)
    policy = draft.view.spec.run_policy
    failures = without_progress(draft)
    if attempt.failure_class == "permanent":
        ends.fail(draft, reason, f"{said}.")
        return
    if out_of_time(draft):
        return
    if is_charged(draft):
        charged = draft.status.charged_restarts or 0
        if charged >= policy.max_restarts:
            text = f"{said}. The limit of runPolicy.maxRestarts {policy.max_restarts} is reached ({reason.value})."
            ends.fail(draft, Reason.RestartsExhausted, text)
            return
        draft.update(charged_restarts=charged + 1)
        if limits.start_timed_out(draft):  # it is charged once; the next attempt has all of it again
            draft.update(starting_seconds=None)
    elif failures > draft.settings.infrastructure_restarts_without_progress:
        text = f"{failures} attempts in a row failed without a new checkpoint. Last failure: {said}."
        ends.fail(draft, Reason.RestartsWithoutProgress, text)
        return
    pause = backoff(max(1, failures), f"{draft.view.uid}/{attempt.number}", draft.settings)
    draft.update(next_attempt_time=clock.to_text(draft.now + pause + 0.999))
    place_restart(draft)


def out_of_time(draft: Draft) -> bool:
    """End a job that is past its deadline: the next attempt might queue for days, only to be ended at once."""
    if not limits.used_up(draft):
        return False
    attempt = draft.current
    said = sentence(attempt.message or named(attempt.reason).meaning)
    limit = draft.view.spec.run_policy.active_deadline_seconds
    text = f"{said}. runPolicy.activeDeadlineSeconds {limit} has passed, so the job is not restarted."
    ends.fail(draft, Reason.DeadlineExceeded, text)
    return True


def starting_point(draft: Draft) -> str:
    """Return where the next attempt continues, in words."""
    reached = draft.status.checkpoint_step
    return f"step {reached}" if reached else "the newest checkpoint, if there is one"


def place_restart(draft: Draft) -> None:
    """Report that another attempt follows."""
    attempt = draft.current
    start = f"from {starting_point(draft)}"
    said = sentence(attempt.message or attempt.reason or "the attempt ended")
    text = f"Attempt {attempt.number} ended ({attempt.reason}): {said}. Attempt {attempt.number + 1} continues {start}."
    draft.place("Restarting", Reason.Restarting, text)
