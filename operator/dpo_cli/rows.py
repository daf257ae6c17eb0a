"""The rows that `dpo run` shows, as plain text: one per phase, from the trainer's progress events.

No input or output here: `screen` writes the rows to a terminal or a log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dpo_api.metrics import ACCURACY, LOSS, MARGIN, Group
from dpo_api.progress import PHASE_TEXTS, PHASE_UNITS, Phase, Progress
from dpo_api.texts import clock, figure, fixed

LABELS: dict[Phase, str] = {"starting": "start", "validate": "val"}
"""Labels that differ from the phase's own name."""

ENDINGS: tuple[Phase, ...] = ("done", "failed")
PAUSES: tuple[Phase, ...] = ("validate", "checkpoint")
"""Phases that interrupt training, which then goes on."""


@dataclass(frozen=True)
class Row:
    """One line of the screen: the text of a phase, the seconds it has taken, and its progress from 0 to 1, if known."""

    label: str
    text: str
    seconds: float
    share: float | None = None


@dataclass
class _Phase:
    name: Phase
    started: float
    newest: Progress


def scores(metrics: Mapping[str, float], group: Group) -> list[str]:
    """Return "loss 0.118", "acc 0.98", "margin 3.10": those that the group of metrics has."""
    forms = (("loss", LOSS, figure), ("acc", ACCURACY, lambda value: fixed(value, 2)), ("margin", MARGIN, figure))
    return [f"{word} {form(metrics[f'{group}/{key}'])}" for word, key, form in forms if f"{group}/{key}" in metrics]


def describe(progress: Progress, metrics: dict[str, float], *, running: bool) -> str:
    """Return the text of a phase's row. `metrics` may be newer than the event's own."""
    parts: list[str] = []
    if progress.phase == "train":
        if progress.total:
            parts.append(f"step {progress.step:,}/{progress.total:,}")
        parts += scores(metrics, "train")
        if progress.tokens_per_second:
            parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
        if running and progress.eta_seconds is not None and progress.step < progress.total:
            parts.append(f"ETA {clock(progress.eta_seconds)}")
    elif progress.phase in PAUSES:
        parts.append(f"step {progress.step:,}")
        if progress.phase == "validate":
            parts += scores(metrics, "val")
    elif progress.of or progress.done:
        of = f"/{progress.of:,}" if progress.of else ""
        parts.append(f"{progress.done or 0:,}{of} {PHASE_UNITS.get(progress.phase, '')}".rstrip())
    if progress.message and progress.message not in parts:
        parts.append(progress.message)
    return "  ".join(parts) or PHASE_TEXTS[progress.phase]


def share(progress: Progress) -> float | None:
    """Return how much of the phase is done, from 0 to 1; None if the event does not say."""
    if progress.phase == "train":
        return min(1.0, progress.step / progress.total) if progress.total else None
    return min(1.0, (progress.done or 0) / progress.of) if progress.of else None


@dataclass
class PhaseLog:
    """The phases of one run, fed with its events in order.

    Training is one row from its first step to its last; validations and checkpoints have their own rows.
    """

    current: _Phase | None = None
    training: _Phase | None = None
    newest: Progress | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def feed(self, progress: Progress) -> list[Row]:
        """Take one event and return the rows that it completes."""
        self.newest = progress
        completed: list[Row] = []
        if self.current is not None and self._continues(self.current.newest, progress):
            self.metrics.update(progress.metrics)
            self.current.newest = progress
            return completed
        # The results of a validation come with the first event after it, so metrics are read before the row is
        # completed. The first event of a validation still has the results of the previous one.
        self.metrics.update(progress.metrics)
        if self.current is not None and self.current is not self.training:
            completed.append(self._row(self.current, progress.observed_at))
        if self.training is not None and progress.step > self.training.newest.step:
            # Quick steps do not all have an event; the event of the phase that interrupts training has the last step.
            caught_up = {"phase": "train", "done": None, "of": None, "message": ""}
            self.training.newest = progress.model_copy(update=caught_up)
        if self.training is not None and progress.phase not in ("train", *PAUSES):
            completed.append(self._row(self.training, progress.observed_at))
            self.training = None
        self._begin(progress)
        return completed

    @staticmethod
    def _continues(before: Progress, after: Progress) -> bool:
        """Whether an event is about the same phase and, within it, the same step or set of units."""
        if before.phase in PAUSES and before.step != after.step:
            return False
        other_set = before.of is not None and after.of is not None and before.of != after.of
        return before.phase == after.phase and not (other_set and after.phase != "train")

    def _begin(self, progress: Progress) -> None:
        if progress.phase in ENDINGS:
            self.current = None
        elif progress.phase == "train" and self.training is not None:
            self.training.newest = progress
            self.current = self.training
        else:
            self.current = _Phase(progress.phase, progress.observed_at, progress)
            if progress.phase == "train":
                self.training = self.current

    def close(self, now: float) -> list[Row]:
        """Return the rows of the phases that were running when the trainer ended."""
        rows = [self._row(phase, now) for phase in self._open()]
        self.current = self.training = None
        return rows

    def running(self, now: float) -> list[Row]:
        """Return the rows of what runs now (Unix seconds): training first, then what interrupts it."""
        return [self._row(phase, now, running=True) for phase in self._open()]

    def _open(self) -> list[_Phase]:
        phases = [self.training] if self.training is not None else []
        return [*phases, self.current] if self.current is not None and self.current is not self.training else phases

    def _row(self, phase: _Phase, now: float, *, running: bool = False) -> Row:
        # A running validation has no results yet: those in `metrics` are from the previous one.
        stale = running and phase.name == "validate"
        text = describe(phase.newest, {} if stale else self.metrics, running=running)
        return Row(LABELS.get(phase.name, phase.name), text, max(0.0, now - phase.started), share(phase.newest))
