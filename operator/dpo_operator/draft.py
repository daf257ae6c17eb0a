"""The draft of a decision: the next status, the actions, and when to reconcile again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_api.status import Attempt, ConditionType, DPOJobStatus, State
from dpo_operator import clock, conditions
from dpo_operator.conditions import Truth
from dpo_operator.config import Settings
from dpo_operator.reasons import Reason
from dpo_operator.texts import clean
from dpo_operator.types import Action, Object
from dpo_operator.view import View

ATTEMPTS_KEPT = 128
"""The status keeps the first attempt and the newest ones."""


class Draft:
    """Changed by each policy in turn during one pass."""

    def __init__(self, view: View, now: float, settings: Settings) -> None:
        self.view = view
        self.now = now
        self.settings = settings
        self.status: DPOJobStatus = view.status
        self.actions: list[Action] = []
        self.follows = False
        """Whether the next step only waits for this status to be stored."""
        self.shown: tuple[object, Sequence[Any]] | None = None
        """What ``evidence`` found in the newest attempt's pods, and for what."""
        self._wakes: list[float] = []

    def update(self, **changes: Any) -> None:
        """Change fields of the status."""
        self.status = self.status.model_copy(update=changes)

    def act(self, action: Action) -> None:
        """Add an action."""
        self.actions.append(action)

    def wake_in(self, seconds: float) -> None:
        """Request another pass within this many seconds."""
        self._wakes.append(max(0.0, seconds))

    def wake_at(self, moment: float) -> None:
        """Request another pass at this time or earlier."""
        self.wake_in(moment - self.now)

    def follow(self) -> None:
        """Request the next step as soon as this pass's status is stored."""
        self.follows = True
        self.wake_in(0)

    @property
    def wake(self) -> float | None:
        """Seconds until the earliest requested pass."""
        return min(self._wakes, default=None)

    @property
    def moment(self) -> str:
        """The time of this pass, as text."""
        return clock.to_text(self.now)

    def condition(self, kind: ConditionType, truth: Truth, reason: Reason, message: str) -> None:
        """Set a condition."""
        placed = conditions.put(
            self.status.conditions,
            kind,
            truth,
            reason,
            clean(message, 8000),
            generation=self.view.generation,
            now=self.now,
        )
        self.update(conditions=placed)

    def place(self, state: State, reason: Reason, message: str, *, progressing: bool = True) -> None:
        """Set the state, its message, and the condition Progressing."""
        self.update(state=state, message=clean(message, 4000))
        if state != "Running":  # an ETA applies only to a running attempt
            self.update(summary=self.status.summary.model_copy(update={"eta": None}))
        self.condition(ConditionType.Progressing, "True" if progressing else "False", reason, message)

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt; None before the first one."""
        return self.status.attempts[-1] if self.status.attempts else None

    @property
    def current(self) -> Attempt:
        """The newest attempt as this pass has changed it, for code that runs only when there is one."""
        assert self.status.attempts, "there is no attempt"  # noqa: S101 - callers run only when there is one
        return self.status.attempts[-1]

    @property
    def child(self) -> Object | None:
        """The newest attempt's PyTorchJob, if it is known to exist."""
        return self.view.children.get(self.current.child)

    @property
    def pods(self) -> Sequence[Object]:
        """The newest attempt's pods, rank 0's first."""
        return self.view.pods(self.current)

    def add_attempt(self, attempt: Attempt) -> None:
        """Append an attempt; only the first and the newest ones are kept."""
        attempts = (*self.status.attempts, attempt)
        if len(attempts) > ATTEMPTS_KEPT:
            attempts = (attempts[0], *attempts[-(ATTEMPTS_KEPT - 1) :])
        restarts = max(0, attempt.number - 1)
        self.update(attempts=attempts, attempt=attempt.number, restarts=restarts)

    def change_attempt(self, **changes: Any) -> None:
        """Change the newest attempt."""
        changed = self.current.model_copy(update=changes)
        self.update(attempts=(*self.status.attempts[:-1], changed))
