"""Starts the trainer as a child process, and stops it on request. Uses its command line and imports none of it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from pydantic import ValidationError

from dpo_api.errors import NotFoundError, Outcome
from dpo_api.progress import LastWords

POLL_SECONDS = 0.1
MODULE = [sys.executable, "-m", "dpo_trainer"]
KILLED_EXIT_CODE = 130
"""Exit code of a run that was killed by a second Ctrl-C: what a shell reports for SIGINT."""


def require_trainer() -> None:
    """Raise NotFoundError unless the trainer and torch are installed in this environment."""
    for module in ("dpo_trainer", "torch"):
        if importlib.util.find_spec(module) is None:
            raise NotFoundError(
                f"the trainer is not installed here (no module {module}); run: pip install 'dpo-operator[trainer]'"
            )


@dataclass(frozen=True)
class Launch:
    """The arguments of a run. Paths are local; `run_dir` may be any URI."""

    spec: Path
    run_dir: str
    events: Path
    last_words: Path
    processes: int
    grace_seconds: int
    port: int | None = None
    host: str = "127.0.0.1"
    joined: bool = False
    """Whether this process is one of a run that another program has started; its variables say which."""

    def command(self) -> list[str]:
        """Return the trainer's command line."""
        words = [*MODULE, "launch", f"--spec={self.spec}", f"--run-dir={self.run_dir}", f"--events={self.events}"]
        words += [f"--last-words={self.last_words}", f"--processes={self.processes}"]
        words += [f"--grace-seconds={self.grace_seconds}"]
        if self.joined:
            words.append("--joined")
        return words if self.port is None else [*words, f"--port={self.port}", f"--host={self.host}"]


@dataclass
class Requests:
    """Counts the requests to stop this process (Ctrl-C, SIGTERM, a closed terminal)."""

    count: int = 0
    woken: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Count signals instead of being ended by them, until the block ends."""

        def count_signal(_number: int, _frame: FrameType | None) -> None:
            self.count += 1

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, count_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def start(command: Sequence[str], log: BinaryIO, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the trainer in a new session, so that Ctrl-C in the terminal reaches only this process."""
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def wait(
    child: subprocess.Popen[bytes],
    requests: Requests,
    *,
    look: Callable[[], None],
    stopping: Callable[[], None],
    sleep: Callable[[float], None],
) -> bool:
    """Wait for the trainer, and call `look` at every poll; return whether it was killed.

    The first request to stop calls `stopping` and sends SIGTERM, on which the trainer writes a checkpoint. The second
    one kills the trainer and all of its descendants.
    """
    asked = False
    while child.poll() is None:
        if requests.count > 1:
            kill_tree(child.pid)
            child.wait()
            return True
        if requests.count == 1 and not asked:
            asked = True
            child.terminate()
            stopping()
        look()
        sleep(POLL_SECONDS)
    return False


def kill_tree(root: int) -> None:
    """Kill a process and all of its descendants. Killing its process group would miss ranks in their own sessions."""
    processes = [root]
    parents = _parents()
    for process in processes:
        processes += [child for child, parent in parents.items() if parent == process]
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def _parents() -> Mapping[int, int]:
    """Return the parent of each process, from /proc; empty on systems without it."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The command name, in parentheses, may contain spaces: count fields from its end.
            found[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    return found


def last_words(path: Path, code: int) -> LastWords:
    """Return the trainer's termination message, or one made from its exit code if there is none."""
    with suppress(OSError, ValidationError):
        return LastWords.from_json(path.read_bytes())
    outcome = Outcome.of_exit_code(code)
    if outcome in (None, Outcome.Succeeded, Outcome.Internal):
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return LastWords(
            outcome=Outcome.Internal.name, message=f"the trainer ended without a termination message ({how})"
        )
    assert outcome is not None  # noqa: S101 - for the type checker: None is in the tuple above
    return LastWords(outcome=outcome.name, message=outcome.description)


@dataclass(frozen=True)
class IndexResult:
    """The result of `python -m dpo_trainer index`, or why there is none."""

    counts: Mapping[str, Any] | None
    outcome: Outcome
    message: str = ""


def index(spec: Path) -> IndexResult:
    """Read and check all data with the trainer's own index pass, which takes as long as reading the data."""
    done = subprocess.run([*MODULE, "index", f"--spec={spec}"], capture_output=True, check=False)
    answer = done.stdout.strip().rpartition(b"\n")[2]
    if done.returncode == 0:
        with suppress(ValueError):
            counts = json.loads(answer)
            if isinstance(counts, dict):
                return IndexResult(counts, Outcome.Succeeded)
    with suppress(ValidationError):
        words = LastWords.from_json(answer)
        return IndexResult(None, words.known_outcome, words.message)
    lines = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return IndexResult(None, Outcome.Internal, f"the index pass failed: {lines[-1] if lines else done.returncode}")
