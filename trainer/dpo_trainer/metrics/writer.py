"""What every sink of metrics can do, and the rule that none of them stops a training run."""

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
        """Take one event. Steps never fall; a step may have several events (train, then val)."""

    def flush(self) -> None:
        """Make what was written visible to readers, now."""

    def close(self) -> None:
        """Flush and let go. Nothing is written afterwards."""


class Guarded:
    """A sink that may fail without harm: the first failure is one warning, training goes on, the sink is tried again.

    A sink that wraps a network service or a third-party library belongs in here.
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
                log.warning("%s does not take metrics (%s); training goes on without it", self.name, summary(error))


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
        """Close every sink, whatever another one's closing raises; that is one warning."""
        for writer in self._writers:
            Guarded("a sink", writer).close()


class Background:
    """Runs one slow action in a thread, at most every ``interval`` seconds, so that no step waits for a network.

    ``request`` asks for a run; requests made meanwhile are answered by one later run. A failure is one warning and is
    tried again at the next request. ``finish`` runs the action a last time in the caller, and raises what it raises.
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
        """Run the action in the caller, after a run that is under way."""
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
            # In this order: what `finish` sets after it is seen here, what it set before is not cleared unseen.
            self._wanted.clear()
            if self._stopped.is_set():
                return
            try:
                with self._running:
                    self._action()
            except Exception as error:  # noqa: BLE001 - see Guarded
                if not self._warned:
                    log.warning("%s cannot be written now (%s); trying again later", self._name, summary(error))
                self._warned = True
            self._stopped.wait(self._interval)


def telling(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out what would be taken for a verdict on the policy and is none: before the first step it is the reference,
    so rewards are rounding and the accuracy is about 0.
    """
    if step > 0:
        return dict(metrics)
    names = {name: name.rpartition("/")[2] for name in metrics}
    return {name: metrics[name] for name, last in names.items() if last != "acc" and not last.startswith("rewards_")}


def event_line(step: int, metrics: Mapping[str, float]) -> bytes:
    """One event as a line of strict JSON; NaN and infinities, which JSON lacks, are left out."""
    values = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return (json.dumps({"step": step, **values}, allow_nan=False, ensure_ascii=False) + "\n").encode()


def summary(error: BaseException) -> str:
    """The first line of an error, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
