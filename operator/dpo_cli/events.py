"""Follows the file to which a running trainer appends its progress, one JSON object per line."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from dpo_api.progress import Progress


class EventTail:
    """Reads what was appended since the last read. A line is complete once its newline is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Progress]:
        """Return the new events, oldest first; none while the file does not exist. Skips lines that are no events."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        events = []
        for line in complete.splitlines():
            try:
                events.append(Progress.from_json(line))
            except ValidationError:
                continue
        return events
