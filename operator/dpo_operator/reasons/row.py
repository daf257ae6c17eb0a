"""The columns of the table of reasons. Every property of a reason is decided here, and nowhere else in the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_api.errors import Outcome, Retry

Topic = Literal["acceptance", "progress", "cause", "end", "invariant", "event"]

TOPICS: dict[Topic, str] = {
    "acceptance": "Whether a job is accepted",
    "progress": "What a job is doing",
    "cause": "Why an attempt ended",
    "end": "Why a job ended",
    "invariant": "What the run itself shows",
    "event": "Events only",
}

Charged = Literal["always", "after start time-out", "never"]
"""``after start time-out``: only once runPolicy.startTimeoutSeconds is used up."""

Suspects = Literal["no node", "its node", "silent nodes"]
"""``its node``: the nodes whose pods explain the attempt with this reason. ``silent nodes``: the nodes whose pods
reported nothing, where other pods did: a process that lost contact says so, and the one that hangs does not."""

WEAK = 10
"""Ranks from here on are weak evidence: any other cause explains an attempt better."""

_RANKS: dict[Retry, int] = {"permanent": 0, "infrastructure": 1, "retryable": 2, "none": 0}


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One reason with all of its properties."""

    word: str
    """The reason as the API spells it."""
    topic: Topic
    meaning: str
    """What happened, in one sentence."""
    remedy: str
    """What to do about it."""
    event: Literal["Normal", "Warning"] | None = None
    """Type of the Kubernetes event that reports this reason; None: no event does."""
    retry: Retry = "none"
    """Class of the failure. ``permanent`` is final: it ends the job."""
    charged: Charged = "never"
    """Whether an attempt that ends with it counts against runPolicy.maxRestarts."""
    suspects: Suspects = "no node"
    """The nodes that the next attempts avoid."""
    ended_by_operator: bool = False
    """Whether the operator itself ends the attempt, by deleting its PyTorchJob."""
    rank: int = 0
    """Where several causes, or several obstacles, are found at once, the one of lowest rank is reported."""


def cause(
    word: str,
    meaning: str,
    remedy: str,
    retry: Literal["permanent", "infrastructure", "retryable"],
    *,
    charged: Charged | None = None,
    suspects: Suspects = "no node",
    ended_by_operator: bool = False,
    rank: int | None = None,
) -> Row:
    """Return the row of a cause: it is reported by a warning.

    ``charged``: None charges it where its class is ``retryable``.
    """
    return Row(
        word=word,
        topic="cause",
        meaning=meaning,
        remedy=remedy,
        event="Warning",
        retry=retry,
        charged=charged or ("always" if retry == "retryable" else "never"),
        suspects=suspects,
        ended_by_operator=ended_by_operator,
        rank=_RANKS[retry] if rank is None else rank,
    )


def cause_of(outcome: Outcome, remedy: str, *, suspects: Suspects = "no node", rank: int | None = None) -> Row:
    """Return the row for an outcome of the trainer; its word, class and meaning come from the outcome."""
    assert outcome.retry != "none", outcome  # noqa: S101 - success is no cause
    return cause(
        outcome.name,
        outcome.description,
        remedy,
        outcome.retry,
        suspects=suspects,
        rank=rank,
    )
