"""Requests to stop: a signal to any process, or the time limit. All ranks act on them at the same step."""

import signal
import time
from dataclasses import dataclass, field
from typing import Any

from dpo_api.errors import StoppedError
from dpo_trainer.distributed import World


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and why."""

    limit_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    signalled: bool = False
    asked_at: float | None = None
    """When the first signal came, by the monotonic clock."""

    def listen(self) -> None:
        """Turn SIGTERM and SIGINT into a request. The handler only sets a flag."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, _signal: int, _frame: Any) -> None:
        self.signalled = True
        if self.asked_at is None:
            self.asked_at = time.monotonic()

    @property
    def _used_up(self) -> bool:
        return self.limit_seconds is not None and time.monotonic() - self.started >= self.limit_seconds

    @property
    def wanted(self) -> bool:
        """Whether this process should stop."""
        return self.signalled or self._used_up

    def reason(self, world: World | None = None) -> str:
        """Return why the run stops, the same on all ranks of ``world``. A collective; None: why this process does."""
        signalled, used_up = self.signalled, self._used_up
        if world is not None:
            signalled, used_up = world.any_of(signalled, used_up)
        if used_up and not signalled:
            return f"training.maxRunSeconds ({self.limit_seconds:g} s) is used up"
        return "asked to stop"

    def agreed(self, world: World) -> bool:
        """Return whether any rank should stop, the same on all ranks. A collective."""
        return world.any(self.wanted)

    def agreed_with(self, world: World, busy: bool) -> tuple[bool, bool]:
        """Return whether any rank should stop, and whether any is ``busy``, the same on all ranks. A collective."""
        stop, working = world.any_of(self.wanted, busy)
        return stop, working

    def leave_before_training(self, world: World, phase: str) -> None:
        """Raise StoppedError on all ranks if any was asked to stop before there is anything to save. A collective."""
        if self.agreed(world):
            raise StoppedError(f"{self.reason(world)} during {phase}; the same command continues from there")
