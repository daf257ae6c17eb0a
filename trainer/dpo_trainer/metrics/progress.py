"""A run's progress: appended to the events file that `dpo run` follows, and served at /status."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dpo_api.progress import Best, Phase, Progress
from dpo_trainer.metrics.writer import summary
from dpo_trainer.pace import Slow

log = logging.getLogger(__name__)

WINDOW_STEPS = 20
"""Steps that the reported speed is averaged over: enough to smooth packs of different sizes, few to be current."""

QUIET_SECONDS = 0.1
"""Minimum time between two lines of the events file within a phase. /status always has the newest state."""


class Publisher(Protocol):
    """Takes the newest progress: metrics.server.StatusServer."""

    def publish(self, progress: Progress) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class _StepCost:
    seconds: float
    tokens: int
    pairs: int


class ProgressTracker:
    """Turns reports of the training loop into Progress messages. Used on rank 0, from one thread.

    Times come from ``clock`` (monotonic seconds) and ``now`` (Unix seconds).
    """

    def __init__(
        self,
        events_path: Path | None = None,
        server: Publisher | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._events_path, self._server = events_path, server
        self._clock, self._now = clock, now
        self._state = Progress(phase="starting")
        self._window: deque[_StepCost] = deque(maxlen=WINDOW_STEPS)
        self._started: float | None = None  # when the first step of this attempt began
        self._stepping = 0.0  # seconds spent in steps since then
        self._last_line = -QUIET_SECONDS
        self._broken = False
        self._unwritten = False  # whether warnings are not in the events file yet

    @property
    def newest(self) -> Progress:
        """The newest state."""
        return self._state

    def begin(self, attempt: int, layout: str = "", revisions: Sequence[str] = ()) -> None:
        """Report the attempt's number, its layout and the commits of its inputs, as ``Progress`` holds them."""
        self._update(attempt=attempt, layout=layout, revisions=tuple(revisions))

    def plan(self, *, step: int, total: int, epoch: float = 0.0, last_checkpoint_step: int | None = None) -> None:
        """Report the step at which the run starts (0, or the checkpoint's) and the last one."""
        self._update(step=step, total=total, epoch=epoch, last_checkpoint_step=last_checkpoint_step, from_step=step)
        self._emit(always=True)

    def phase(self, phase: Phase, *, done: int | None = None, of: int | None = None, message: str = "") -> None:
        """Enter a phase, or report that ``done`` of ``of`` units, such as reference pairs, are done."""
        entered = phase != self._state.phase
        if phase in {"done", "failed"}:
            self._update(eta_seconds=None)
        self._update(phase=phase, done=done, of=of, message=message[:1024])
        self._emit(always=entered or done is None or done == of)

    def warn(self, warnings: Sequence[str]) -> None:
        """Report warnings: once in the events file, and at /status from now on."""
        if warnings:
            self._unwritten = True
            self._update(warnings=(*self._state.warnings, *warnings))
            self._emit(always=True)

    def verified(self, verified: bool | None, verdict: str) -> None:
        """Report what the comparison of the layout with one process found; None: it was not made."""
        self._update(layout_verified=verified, layout_verdict=verdict[:1024])

    def slow(self, slow: Slow | None, host: str = "") -> None:
        """Report the rank that stays slow, with its host; None: there is none, or no longer."""
        if slow is None:
            self._update(slow_rank=None, slow_rank_ratio=None, slow_rank_host="")
        else:
            self._update(slow_rank=slow.rank, slow_rank_ratio=slow.ratio, slow_rank_host=host[:253])

    def finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that the run was complete before this attempt started."""
        self._update(step=step, total=max(step, self._state.total), metrics=dict(metrics), last_checkpoint_step=None)
        self.phase("done")

    def step(
        self,
        step: int,
        *,
        epoch: float,
        seconds: float,
        tokens: int,
        pairs: int,
        metrics: Mapping[str, float],
        at_start: float | None = None,
    ) -> None:
        """Report one optimizer step: its seconds, tokens and pairs of all processes, and metrics as ``train/loss``.

        at_start: the preference loss of the step's pairs while the policy equals its reference; None if it never did.
        """
        if self._started is None:
            self._started = self._clock() - seconds
        self._window.append(_StepCost(seconds, tokens, pairs))
        self._stepping += seconds
        spent = sum(cost.seconds for cost in self._window)
        if step == 1:
            self._first_loss(metrics.get("train/preference_loss"), at_start)
        self._update(
            phase="train",
            done=None,
            of=None,
            message="",
            step=step,
            epoch=epoch,
            metrics={**self._state.metrics, **metrics},
            tokens_per_second=sum(cost.tokens for cost in self._window) / spent if spent > 0 else None,
            pairs_per_second=sum(cost.pairs for cost in self._window) / spent if spent > 0 else None,
            eta_seconds=self._eta(step),
        )
        self._emit(always=step == self._state.total)

    def _first_loss(self, seen: float | None, expected: float | None) -> None:
        """Keep the first loss and its expected value. A reader that polls rarely sees step 1 as the newest one."""
        self._update(first_preference_loss=seen, expected_first_preference_loss=expected)

    def measured(self, metrics: Mapping[str, float], *, at_start: float | None = None) -> None:
        """Report metrics outside a step, such as ``val/acc``. ``at_start``: see ``step``; it counts before step 1."""
        if self._state.step == 0:
            self._first_loss(metrics.get("val/preference_loss"), at_start)
        self._update(metrics={**self._state.metrics, **metrics})
        self._emit(always=True)

    def best(self, best: Best | None) -> None:
        """Report the best validation so far."""
        self._update(best=best)

    def saved(self, step: int) -> None:
        """Report a complete checkpoint."""
        self._update(last_checkpoint_step=step)
        self._emit(always=True)

    def _eta(self, step: int) -> float | None:
        """Return seconds until the last step: the window's mean, scaled by the overhead of validation and saving."""
        assert self._started is not None  # noqa: S101 - set by the only caller
        if self._state.total == 0:
            return None
        left = max(0, self._state.total - step)
        mean = sum(cost.seconds for cost in self._window) / len(self._window)
        elapsed = self._clock() - self._started
        overhead = max(1.0, elapsed / self._stepping) if self._stepping > 0 else 1.0
        return left * mean * overhead

    def _update(self, **changes: object) -> None:
        # Validated, which drops NaN and rejects values that readers cannot handle.
        self._state = Progress.model_validate({**dict(self._state), **changes, "observed_at": self._now()})

    def _emit(self, *, always: bool) -> None:
        if self._server is not None:
            self._server.publish(self._state)
        clock = self._clock()
        if self._events_path is None or not (always or clock - self._last_line >= QUIET_SECONDS):
            return
        self._last_line = clock
        line = self._state if self._unwritten else self._state.model_copy(update={"warnings": ()})
        self._unwritten = False
        try:
            with self._events_path.open("ab", buffering=0) as file:
                file.write((line.to_json() + "\n").encode())
        except OSError as error:
            if not self._broken:
                log.warning("progress cannot be written to %s (%s)", self._events_path, summary(error))
            self._broken = True
