"""Cleans texts of pods, the API server and the trainer for a status: short, one line, no control characters."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def clean(text: str, limit: int = 1000) -> str:
    """Return untrusted text as one short line."""
    line = _CONTROL.sub(" ", text[: 4 * limit]).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def last_line(text: str, limit: int = 300) -> str:
    """Return the last line of a log that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return clean(lines[-1], limit) if lines else ""


def sentence(text: str) -> str:
    """Return a text that can be followed by another sentence."""
    return text.rstrip(" .;")
