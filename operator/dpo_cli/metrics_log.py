"""Reads a run directory's metrics: one JSON object per line, in one file locally or one object per attempt on S3."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dpo_api.errors import InvalidDataError

Point = tuple[int, float]
"""One observation: (step, value)."""

LOG_NAME = re.compile(r"metrics(?:[-./](?:attempt-)?(\d+))?\.jsonl")
"""`metrics.jsonl`, or one log per attempt: `metrics-0002.jsonl`, `metrics/attempt-0002.jsonl`."""


@dataclass(frozen=True)
class Event:
    """One line of the log: the optimizer step it belongs to and its metrics."""

    step: int
    attempt: int
    values: Mapping[str, float]

    @property
    def trains(self) -> bool:
        """Whether this event reports an optimizer step, not a validation."""
        return any(name.startswith("train/") for name in self.values)


@dataclass(frozen=True)
class MetricsLog:
    """Every metric of a run as a series over steps, with one value per step."""

    series: Mapping[str, Sequence[Point]]

    def get(self, name: str) -> Sequence[Point]:
        """Return the metric's series, sorted by step; empty for a metric that was not logged."""
        return self.series.get(name, ())

    def names(self, prefix: str) -> list[str]:
        """Return the metrics that start with the prefix, sorted."""
        return sorted(name for name in self.series if name.startswith(prefix))

    @property
    def last_step(self) -> int:
        """The last step of any metric; 0 for an empty log."""
        return max((points[-1][0] for points in self.series.values() if points), default=0)


def attempt_of(path: str) -> int | None:
    """Return the attempt that a log's path names (1 if it names none), or None if it is not a metrics log."""
    found = LOG_NAME.fullmatch(path)
    return None if found is None else int(found.group(1) or 1)


def parse_events(name: str, data: bytes, attempt: int = 1) -> list[Event]:
    """Return the log's events. An incomplete last line, left by a killed writer, is skipped.

    Raises InvalidDataError naming `name:line` for any other line that is not a JSON object with a step.
    """
    lines = data.split(b"\n")
    events = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise InvalidDataError(f"{name}:{number}: not a JSON object with a step: {_shown(line)}") from None
        own = record.get("attempt")
        events.append(Event(step, own if isinstance(own, int) else attempt, dict(_numbers(record))))
    return events


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return text if len(text) <= 80 else text[:79] + "…"


def _numbers(record: Mapping[str, object]) -> Iterable[tuple[str, float]]:
    for name, value in record.items():
        if name in ("step", "attempt") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            yield name, float(value)


def merge(events: Iterable[Event]) -> MetricsLog:
    """Join the events of all attempts into one series per metric.

    A resumed attempt repeats some steps: from the first step that a later attempt trained, events of earlier attempts
    are dropped. If a step has several values, the last one of the highest attempt is kept.
    """
    by_attempt: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        by_attempt[event.attempt].append(event)
    kept: list[Event] = []
    resumed_at = math.inf
    for attempt in sorted(by_attempt, reverse=True):
        kept[:0] = [event for event in by_attempt[attempt] if event.step < resumed_at]
        resumed_at = min([resumed_at, *(event.step for event in by_attempt[attempt] if event.trains)])
    columns: dict[str, dict[int, float]] = defaultdict(dict)
    for event in kept:
        for name, value in event.values.items():
            columns[name][event.step] = value
    return MetricsLog({name: sorted(column.items()) for name, column in columns.items()})
