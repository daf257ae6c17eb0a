"""What keeps an object of a job from being created: the reason, and the sentence about it."""

from __future__ import annotations

from dpo_operator.reasons import Reason
from dpo_operator.texts import clean
from dpo_operator.types import Refusal

Obstacle = tuple[Reason, str]


def refused(kind: str, name: str, refusal: Refusal) -> Obstacle:
    """Return the obstacle that a refusal by the API server is."""
    return Reason.ChildRefused, f"The API server refused to create {kind} {name}: {clean(refusal.message, 2000)}"


def name_taken(kind: str, name: str) -> Obstacle:
    """Return the obstacle that an object of this name and another owner is."""
    return Reason.ChildNameTaken, f"{kind} {name} already exists and belongs to another owner: delete it."
