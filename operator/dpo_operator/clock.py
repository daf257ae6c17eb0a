"""Kubernetes times. A moment is a number of Unix seconds; nothing in this package reads the clock."""

from __future__ import annotations

from datetime import UTC, datetime


def to_text(moment: float) -> str:
    """Return a moment as RFC 3339 in UTC with whole seconds."""
    return datetime.fromtimestamp(int(moment), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_micro_text(moment: float) -> str:
    """Return a moment as RFC 3339 in UTC with microseconds (Kubernetes' MicroTime)."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def to_moment(text: str) -> float:
    """Return the moment of an RFC 3339 text. Raises ValueError for anything else."""
    return datetime.fromisoformat(text).timestamp()
