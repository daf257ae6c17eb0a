"""Conditions: one entry per type, whose transition time changes only with its status."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from dpo_api.status import Condition, ConditionType
from dpo_operator import clock
from dpo_operator.reasons import Reason

Truth = Literal["True", "False", "Unknown"]

_ORDER = {kind.value: index for index, kind in enumerate(ConditionType)}


def find(conditions: Iterable[Condition], kind: ConditionType) -> Condition | None:
    """Return the condition of a type."""
    return next((condition for condition in conditions if condition.type == kind.value), None)


def holds(conditions: Iterable[Condition], kind: ConditionType) -> bool:
    """Whether a condition is True."""
    condition = find(conditions, kind)
    return condition is not None and condition.status == "True"


def put(
    conditions: Iterable[Condition],
    kind: ConditionType,
    status: Truth,
    reason: Reason,
    message: str,
    *,
    generation: int | None,
    now: float,
) -> tuple[Condition, ...]:
    """Return the conditions with this one set, in the order in which the API lists the types."""
    others = [condition for condition in conditions if condition.type != kind.value]
    former = find(conditions, kind)
    since = former.last_transition_time if former is not None and former.status == status else clock.to_text(now)
    condition = Condition(
        type=kind.value,
        status=status,
        observed_generation=generation,
        last_transition_time=since,
        reason=reason.value,
        message=message[:32_768],
    )
    return tuple(sorted([*others, condition], key=lambda c: (_ORDER.get(c.type, len(_ORDER)), c.type)))


def without(conditions: Iterable[Condition], *kinds: ConditionType) -> tuple[Condition, ...]:
    """Return the conditions that are of none of these types."""
    dropped = {kind.value for kind in kinds}
    return tuple(condition for condition in conditions if condition.type not in dropped)


def observed_for(conditions: Iterable[Condition], generation: int) -> tuple[Condition, ...]:
    """Return the conditions with this observedGeneration; their transition times are unchanged.

    ``kubectl wait`` ignores a condition that was observed for an older generation.
    """
    return tuple(condition.model_copy(update={"observed_generation": generation}) for condition in conditions)
