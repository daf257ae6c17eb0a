"""The interface of metrics sinks, and wrappers so that a failing or slow sink does not stop a training run."""

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

log = logging.getLogger(__name__)


class MetricsWriter(Protocol):
    """A sink of events: named numbers of one optimizer step, ``train/loss``, ``val/acc``."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one event. Steps never decrease; a step may have several events (train, then val)."""

    def flush(self) -> None:
        """Make what was written visible to readers."""

    def close(self) -> None:
        """Flush and close. Nothing is written afterwards."""


class Guarded:
    """Wraps a sink that may fail. The first failure is logged as a warning; training continues and tries it again.

    Use it for every sink that wraps a network service or a third-party library.
    """

    def __init__(self, name: str, writer: MetricsWriter) -> None:
        self.name = name
        self.failures = 0
        self._writer = writer

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See MetricsWriter."""
        self._try(lambda: self._writer.write(step, metrics))

    def flush(self) -> None:
        """See MetricsWriter."""
        self._try(self._writer.flush)

    def close(self) -> None:
        """See MetricsWriter."""
        self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - foreign code; training must not end because a dashboard is away
            self.failures += 1
            if self.failures == 1:
                log.warning("%s does not accept metrics (%s); training continues without it", self.name, summary(error))


class Writers:
    """Several sinks as one."""

    def __init__(self, writers: Sequence[MetricsWriter]) -> None:
        self._writers = writers

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See MetricsWriter."""
        for writer in self._writers:
            writer.write(step, metrics)

    def flush(self) -> None:
        """See MetricsWriter."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Close every sink; an error while closing one is logged as a warning."""
        for writer in self._writers:
            Guarded("a sink", writer).close()


class Background:
    """Runs one slow action in a thread, at most every ``interval`` seconds, so that no step waits for a network.

    ``request`` asks for a run; requests during a run lead to one later run. The first failure is logged as a warning;
    the next request tries again. ``finish`` runs the action a last time in the caller and raises what it raises.
    """

    def __init__(self, name: str, action: Callable[[], None], interval: float) -> None:
        self._name, self._action, self._interval = name, action, interval
        self._wanted, self._stopped = threading.Event(), threading.Event()
        self._warned = False
        self._running = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Ask for a run; returns at once."""
        self._wanted.set()

    def now(self) -> None:
        """Run the action in the caller, after any run in the thread has ended."""
        self._wanted.clear()
        with self._running:
            self._action()

    def finish(self) -> None:
        """End the thread and run the action once more."""
        self._stopped.set()
        self._wanted.set()
        self._thread.join()
        self.now()

    def _loop(self) -> None:
        while True:
            self._wanted.wait()
            # Clear before the check: a stop that is set later wakes this loop again.
            self._wanted.clear()
            if self._stopped.is_set():
                return
            try:
                with self._running:
                    self._action()
            except Exception as error:  # noqa: BLE001 - see Guarded
                if not self._warned:
                    log.warning("%s cannot be written (%s); trying again later", self._name, summary(error))
                self._warned = True
            self._stopped.wait(self._interval)


def without_meaningless(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics without those that say nothing about the policy before the first step.

    The policy equals the reference then, so rewards are rounding errors and the accuracy is about 0.
    """
    if step > 0:
        return dict(metrics)
    names = {name: name.rpartition("/")[2] for name in metrics}
    return {name: metrics[name] for name, last in names.items() if last != "acc" and not last.startswith("rewards_")}


def run_id(run_dir: str) -> str:
    """Return the id of a run directory for a tracking service, the same for all its attempts."""
    return hashlib.sha256(run_dir.rstrip("/").encode()).hexdigest()[:16]


def event_line(step: int, metrics: Mapping[str, float]) -> bytes:
    """Return one event as a line of strict JSON, without NaN and infinities, which JSON does not have."""
    values = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return (json.dumps({"step": step, **values}, allow_nan=False, ensure_ascii=False) + "\n").encode()


def summary(error: BaseException) -> str:
    """Return the first line of an error, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
