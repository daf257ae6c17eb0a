"""Fields of the API that are not implemented yet. Setting one is an error; none is ignored.

The API server refuses them too, by a CEL rule of each field. To implement one, delete its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dpo_api.findings import Finding
from dpo_api.spec import DPOJobSpec


@dataclass(frozen=True)
class NotYet:
    """One value that this version does not implement."""

    field: str
    """Path in camelCase."""
    asks: Callable[[DPOJobSpec], bool]
    """Returns whether a spec asks for it."""
    instead: str
    """What to write instead."""
    allows: str | None = "false"
    """CEL rule of the field: the values of ``self`` that are implemented. None where another rule already refuses all
    others."""

    @property
    def message(self) -> str:
        """What an error about the field says."""
        return f"is not implemented in this version; {self.instead}"


NOT_YET: tuple[NotYet, ...] = (
    NotYet(
        "spec.transformerEngine.attention",
        lambda s: s.transformer_engine.attention,
        "attention is the trainer's own with every setting; leave it out",
        "!self",
    ),
)


def refused(spec: DPOJobSpec) -> Iterator[Finding]:
    """Yield an error for each field of the spec that this version does not implement."""
    for entry in NOT_YET:
        if entry.asks(spec):
            yield Finding("error", entry.field, entry.message)
