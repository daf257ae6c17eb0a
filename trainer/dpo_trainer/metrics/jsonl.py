"""The run's metrics record: one strict JSON object per event, in a local file or in one object per attempt.

A local run directory has one ``metrics.jsonl`` that is appended to. A resumed run first drops the events after its
checkpoint, so that every step is there once. Object stores cannot append, and two attempts must not write one object,
so each attempt rewrites its own, such as ``metrics/attempt-0003.jsonl``. The reader (dpo_cli.metrics_log) merges them:
a later attempt's steps replace an earlier one's.
"""

import errno
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from dpo_api.errors import NotFoundError
from dpo_store import Store, join_uri
from dpo_trainer.metrics.writer import Background, event_line

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 30.0
"""Minimum time between two rewrites of an attempt's object."""


class LocalLog:
    """``metrics.jsonl`` in a local run directory. A line is complete or absent, even if the process is killed.

    Raises OSError if it cannot be written: the record is part of the run.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """Drop the events after ``resume_step`` (None: all, for a fresh start) and open the file for appending."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._kept = truncate(path, resume_step)
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one event in one system call.

        Events that the file held when it was opened are not repeated: a run that validates again at the step it resumed
        from computes the same values.
        """
        fresh = {name: value for name, value in metrics.items() if (step, name.partition("/")[0]) not in self._kept}
        if not fresh:
            return
        line = event_line(step, fresh)
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "No space left on device", self._file.name)

    def flush(self) -> None:
        """Sync the file to disk; this process buffers nothing."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """See MetricsWriter."""
        self._file.close()


def truncate(path: Path, resume_step: int | None) -> set[tuple[int, str]]:
    """Drop events after ``resume_step`` (None: all) and an incomplete last line; returns the (step, group) pairs left.

    The file is always replaced. An earlier attempt that still has it open then writes to a file that is not read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return set()
    kept, seen = kept_events(data, str(path), resume_step)
    spare = path.with_name(f".{path.name}.new")
    with spare.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    spare.replace(path)
    return seen


def kept_events(data: bytes, name: str, resume_step: int | None) -> tuple[list[bytes], set[tuple[int, str]]]:
    """Return the complete lines of a record up to ``resume_step`` (None: none) and their (step, group) pairs."""
    kept: list[bytes] = []
    seen: set[tuple[int, str]] = set()
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            event = json.loads(line)
            step = int(event["step"])
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                log.warning("%s:%d is not an event and is dropped", name, number)
            continue
        if resume_step is not None and step <= resume_step and line.endswith(b"\n"):
            kept.append(line)
            seen.update((step, key.partition("/")[0]) for key in event if key != "step")
    return kept, seen


class ObjectLog:
    """``metrics/attempt-0003.jsonl`` under an object store's run directory, rewritten in the background.

    Memory: this attempt's events, about 500 bytes each. A rewrite starts at most every UPLOAD_SECONDS and never delays
    a step. ``close`` writes it a last time and raises what storage raises.
    """

    def __init__(
        self,
        store: Store,
        run_dir: str,
        attempt: int,
        resume_step: int | None = None,
        *,
        interval: float = UPLOAD_SECONDS,
    ) -> None:
        """Keep the events up to ``resume_step`` that an earlier process with the same attempt number wrote."""
        self.uri = attempt_uri(run_dir, attempt)
        self._store = store
        try:
            self._lines, self._kept = kept_events(store.read(self.uri), self.uri, resume_step)
        except NotFoundError:
            self._lines, self._kept = [], set()
        self._lock = threading.Lock()
        self._written = 0
        self._upload = Background(self.uri, self._put, interval)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one event, without the metrics that were kept from an earlier process."""
        fresh = {name: value for name, value in metrics.items() if (step, name.partition("/")[0]) not in self._kept}
        if not fresh:
            return
        with self._lock:
            self._lines.append(event_line(step, fresh))
        self._upload.request()

    def flush(self) -> None:
        """Write now. Raises a DPOError when storage cannot be reached."""
        self._upload.now()

    def close(self) -> None:
        """Write a last time. Raises a DPOError when storage cannot be reached."""
        self._upload.finish()

    def _put(self) -> None:
        with self._lock:
            count, data = len(self._lines), b"".join(self._lines)
        if count != self._written:
            self._store.write(self.uri, data)
            self._written = count


def attempt_uri(run_dir: str, attempt: int) -> str:
    """Return the address of an attempt's events."""
    return join_uri(run_dir, f"metrics/attempt-{attempt:04d}.jsonl")
