"""One pure function from what was observed to what should be done."""

from __future__ import annotations

from dpo_operator.config import Settings
from dpo_operator.types import Decision, Observed


def reconcile(observed: Observed, now: float, settings: Settings) -> Decision:
    """Decide. ``now``: Unix seconds. Pure: the same arguments give the same decision."""
    raise NotImplementedError
