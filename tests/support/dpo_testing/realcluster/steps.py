"""What is being done, said as it is done, with its time; kept for the table at the end."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_WIDTH = 46


class Steps:
    """Prints one line a step and appends it to a file of JSON lines, which outlives the process."""

    def __init__(self, record: Path) -> None:
        self._record = record

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block. Nothing is kept of one that fails."""
        sys.stdout.write(f"  {name} {'.' * max(2, _WIDTH - len(name))} ")
        sys.stdout.flush()
        began = time.monotonic()
        try:
            yield
        except BaseException:
            print(f"failed after {time.monotonic() - began:.1f} s", flush=True)
            raise
        seconds = time.monotonic() - began
        print(f"{seconds:6.1f} s", flush=True)
        self._keep(name, seconds, within=False)

    def note(self, name: str, seconds: float) -> None:
        """Keep the time of a part of a step, which does not count twice."""
        self._keep(name, seconds, within=True)

    def _keep(self, name: str, seconds: float, *, within: bool) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        with self._record.open("a") as out:
            out.write(json.dumps({"step": name, "seconds": round(seconds, 2), "within": within}) + "\n")

    def table(self) -> str:
        """Return all steps and their sum as text."""
        if not self._record.exists():
            return ""
        rows = [json.loads(line) for line in self._record.read_text().splitlines()]
        width = max((len(row["step"]) for row in rows), default=0)
        together = sum(row["seconds"] for row in rows if not row["within"])
        lines = [f"  {row['step']:<{width}}  {row['seconds']:8.1f} s" for row in rows]
        return "\n".join([*lines, f"  {'together':<{width}}  {together:8.1f} s"])
