"""Moments as Kubernetes writes them. Here a moment is Unix seconds; nothing in this package asks for the time."""

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


def duration(seconds: float) -> str:
    """Write a duration as kubectl does: 45s, 12m, 3h12m, 5d4h."""
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m" if minutes else f"{whole}s"
