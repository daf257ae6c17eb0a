"""A wall clock that a test sets, for any process with this folder on its path.

Python imports ``sitecustomize`` from that folder before anything else. The monotonic clock is not changed, as on a
machine whose wall clock is set.
"""

from __future__ import annotations

import time
from pathlib import Path

FOLDER = Path(__file__).parent
VARIABLE = "DPO_PLAYED_CLOCK"


class PlayedClock:
    """The clock of one process, or of several."""

    def __init__(self, file: Path) -> None:
        """``file`` holds by how many seconds the clock is ahead."""
        self._file = file
        self.shift = 0.0
        self.set(0.0)

    @property
    def environment(self) -> dict[str, str]:
        """What the process needs besides the folder on its path."""
        return {VARIABLE: str(self._file)}

    def set(self, shift: float) -> None:
        """Set the clock to this many seconds ahead of the machine's clock."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{shift}", encoding="ascii")
        fresh.replace(self._file)  # nobody reads half a number
        self.shift = shift

    def now(self) -> float:
        """Return the time that the process sees."""
        return time.time() + self.shift
