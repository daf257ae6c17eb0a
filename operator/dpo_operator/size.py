"""How large a status may become. etcd stores objects of at most 1.5 MiB, and every write repeats whole lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dpo_api.status import Attempt, DPOJobStatus
from dpo_operator import patches

ATTEMPTS_WITH_PODS = 5
"""The newest attempts keep the records of their pods; of older ones the number is kept."""

LIMITS = (256 * 1024, 32 * 1024, 4 * 1024)
"""Bytes of a status, as JSON. The first holds unless the API server refuses a status of that size; then the next."""

_SHORT = 200
_PODS_LEFT = 4


def smaller(limit: int | None) -> int | None:
    """Return the limit to try after a status within ``limit`` was refused; None if there is none."""
    former = LIMITS[0] if limit is None else limit
    return next((each for each in LIMITS if each < former), None)


def fit(status: DPOJobStatus, limit: int | None = None) -> DPOJobStatus:
    """Return a status without the pods of old attempts, and what fits into the limit: the oldest is dropped first.

    The newest attempt, the conditions and the numbers that decide about restarts are kept even if they don't fit.
    """
    status = _without_old_pods(status)
    limit = LIMITS[0] if limit is None else limit
    over = _bytes(status) - limit
    if over <= 0:
        return status
    attempts = list(status.attempts)
    for reduced in (_without_pods, _without_message):
        over = _reduce(attempts, reduced, over)
    while over > 0 and len(attempts) > 1:
        over -= _bytes(attempts.pop(1 if len(attempts) > 2 else 0))
    status = status.model_copy(update={"attempts": tuple(attempts)})
    return status if over <= 0 else _shortest(status)


def _reduce(attempts: list[Attempt], reduced: Callable[[Attempt], Attempt], over: int) -> int:
    """Reduce attempts, the oldest first and not the newest, until nothing is over; return what still is."""
    for index, attempt in enumerate(attempts[:-1]):
        if over <= 0:
            break
        attempts[index] = reduced(attempt)
        over -= _bytes(attempt) - _bytes(attempts[index])
    return over


def _without_old_pods(status: DPOJobStatus) -> DPOJobStatus:
    old = status.attempts[:-ATTEMPTS_WITH_PODS]
    if not any(attempt.pods for attempt in old):
        return status
    kept = status.attempts[-ATTEMPTS_WITH_PODS:]
    return status.model_copy(update={"attempts": (*map(_without_pods, old), *kept)})


def _without_pods(attempt: Attempt, left: int = 0) -> Attempt:
    if len(attempt.pods) <= left:
        return attempt
    omitted = (attempt.pods_omitted or 0) + len(attempt.pods) - left
    return attempt.model_copy(update={"pods": attempt.pods[:left], "pods_omitted": omitted})


def _without_message(attempt: Attempt) -> Attempt:
    return attempt.model_copy(update={"message": None})


def _shortest(status: DPOJobStatus) -> DPOJobStatus:
    """Return a status with its newest attempt's first pods, short messages and no metrics."""
    progress = status.progress
    if progress is not None:
        progress = progress.model_copy(update={"metrics": {}, "message": None})
    attempts = tuple(
        _without_pods(attempt, _PODS_LEFT).model_copy(update={"message": _cut(attempt.message)})
        for attempt in status.attempts
    )
    conditions = tuple(each.model_copy(update={"message": _cut(each.message)}) for each in status.conditions)
    changes: dict[str, Any] = {"attempts": attempts, "conditions": conditions, "progress": progress}
    return status.model_copy(update={**changes, "message": _cut(status.message), "final_metrics": {}})


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= _SHORT else text[: _SHORT - 1] + "…"


def _bytes(thing: DPOJobStatus | Attempt) -> int:
    """Return the size as JSON; a character that is not ASCII counts as its escape, which is longer than its UTF-8."""
    return len(json.dumps(patches.to_json(thing), separators=(",", ":")))
