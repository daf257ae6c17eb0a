"""The preference losses by name, and what everything outside the trainer needs to know of each.

CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self


@dataclass(frozen=True)
class LossRow:
    """What a loss computes and what it needs."""

    formula: str
    """The loss of one pair, for the field's description."""
    needs_reference: bool = True
    """Whether Delta is measured against the reference model. If not, no reference log-probs are computed."""
    needs_rewards: bool = False
    """Whether it uses the rewards in the data."""


class Loss(StrEnum):
    """The values of ``spec.dpo.loss``."""

    row: LossRow

    def __new__(cls, value: str, row: LossRow) -> Self:
        """Create a member that equals its name in a manifest."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.row = row
        return member

    DPO = "dpo", LossRow("-log sigmoid(beta Delta)")
    IPO = "ipo", LossRow("(Delta - 1/(2 beta))^2")
    RPO_SQ = "rpo_sq", LossRow("(beta Delta - gap)^2", needs_rewards=True)
    RPO_BWD_KL = (
        "rpo_bwd_kl",
        LossRow("KL(Bernoulli(sigmoid(gap)) || Bernoulli(sigmoid(beta Delta)))", needs_rewards=True),
    )
    RPO_FWD_KL = (
        "rpo_fwd_kl",
        LossRow("KL(Bernoulli(sigmoid(beta Delta)) || Bernoulli(sigmoid(gap)))", needs_rewards=True),
    )


def described() -> str:
    """Return every loss with its formula, for a field's description."""
    return "; ".join(f"`{loss}`: {loss.row.formula}" for loss in Loss)
