"""The status write of a pass: a merge patch with the changed fields and the resourceVersion that was read."""

from __future__ import annotations

from typing import Any

from dpo_api.status import Condition, DPOJobStatus, StatusSection


def to_json(status: StatusSection) -> dict[str, Any]:
    """Return a status, or a part of one, as a JSON object without unset fields."""
    values: dict[str, Any] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return values


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON merge patch (RFC 7386) that turns one object into the other. Lists are replaced as a whole."""
    patch: dict[str, Any] = {}
    for key in old.keys() - new.keys():
        patch[key] = None
    for key, value in new.items():
        former = old.get(key)
        if isinstance(value, dict) and isinstance(former, dict):
            inner = difference(former, value)
            if inner:
                patch[key] = inner
        elif key not in old or former != value:
            patch[key] = value
    return dict(sorted(patch.items()))


def without_progress(status: DPOJobStatus) -> dict[str, Any]:
    """Return a status without the fields that change with every step, to tell whether only progress has changed."""

    def bare(condition: Condition) -> Condition:
        return condition.model_copy(update={"message": ""})

    attempts = tuple(attempt.model_copy(update={"last_step": None}) for attempt in status.attempts)
    return to_json(
        status.model_copy(
            update={
                "progress": None,
                "summary": None,
                "message": None,
                "attempts": attempts,
                "conditions": tuple(bare(condition) for condition in status.conditions),
            }
        )
    )
