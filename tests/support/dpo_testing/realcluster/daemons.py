"""The cluster's programs: started so that they outlive this process, found again by their id, never ended by name."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dpo_testing.realcluster.layout import Layout


def start(layout: Layout, name: str, arguments: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
    """Start a program unless it runs; its output goes to ``logs/<name>.log``."""
    if running(layout, name):
        return
    with (layout.logs / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(word) for word in arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=layout.run,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    _record(layout, name).write_text(json.dumps({"pid": process.pid, "born": _born(process.pid)}))


def running(layout: Layout, name: str) -> int | None:
    """Return the program's process id while it runs."""
    try:
        record = json.loads(_record(layout, name).read_text())
    except (OSError, ValueError):
        return None
    pid = int(record["pid"])
    # A process id is used again: the time of birth tells one process from the next.
    return pid if record["born"] is not None and _born(pid) == record["born"] else None


def stop(layout: Layout, name: str, sign: signal.Signals = signal.SIGTERM, seconds: float = 20.0) -> None:
    """End a program and wait until it is gone; SIGKILL it when it does not go."""
    pid = running(layout, name)
    if pid is not None:
        for each in (sign, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, each)
            if _until(lambda: running(layout, name) is None, seconds):
                break
    _record(layout, name).unlink(missing_ok=True)


def names(layout: Layout) -> list[str]:
    """Return the programs that were started and not stopped."""
    return sorted(path.stem for path in layout.pids.glob("*.json"))


def log_tail(layout: Layout, name: str, characters: int = 3000) -> str:
    """Return the end of what a program has written."""
    path = layout.logs / f"{name}.log"
    return path.read_text(errors="replace")[-characters:] if path.exists() else ""


def wait_until(layout: Layout, name: str, ready: Callable[[], bool], seconds: float = 90.0) -> None:
    """Wait until a program that must be running is ready. An exception of ``ready`` means: not yet."""
    deadline = time.monotonic() + seconds
    last: object = "not ready"
    while time.monotonic() < deadline:
        if running(layout, name) is None:
            raise RuntimeError(f"{name} has ended:\n{log_tail(layout, name)}")
        try:
            if ready():
                return
        except Exception as error:  # noqa: BLE001 - any failure means: not yet
            last = error
        time.sleep(0.1)
    raise RuntimeError(f"{name} is not ready after {seconds:.0f} s ({last}):\n{log_tail(layout, name)}")


def _record(layout: Layout, name: str) -> Path:
    return layout.pids / f"{name}.json"


def _born(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when it is gone or only waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _until(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
