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
    """The loss of one pair, for the field's description, in the terms that ``described`` explains."""
    needs_reference: bool = True
    """Whether Delta is measured against the reference model. If not, no reference log-probs are computed."""
    needs_rewards: bool = False
    """Whether it uses the rewards in the data."""
    smooths: bool = False
    """Whether it uses ``labelSmoothing``."""
    averages: bool = False
    """Whether it always divides a response's log-probs by its length, as with ``averageLogProbs``."""


class Loss(StrEnum):
    """The values of ``spec.dpo.loss``."""

    row: LossRow

    def __new__(cls, value: str, row: LossRow) -> Self:
        """Create a member that equals its name in a manifest."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.row = row
        return member

    DPO = (
        "dpo",
        LossRow("-(1 - epsilon) log sigmoid(beta Delta) - epsilon log sigmoid(-beta Delta)", smooths=True),
    )
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
    ROBUST = (
        "robust",
        LossRow(
            "(epsilon log sigmoid(-beta Delta) - (1 - epsilon) log sigmoid(beta Delta)) / (1 - 2 epsilon)", smooths=True
        ),
    )
    HINGE = "hinge", LossRow("max(0, 1 - beta Delta)")
    EXO_PAIR = "exo_pair", LossRow("KL(Bernoulli(sigmoid(beta Delta)) || Bernoulli(1 - epsilon))", smooths=True)
    NCA_PAIR = "nca_pair", LossRow("-log sigmoid(beta w) - log sigmoid(-beta w) / 2 - log sigmoid(-beta l) / 2")
    BCO_PAIR = "bco_pair", LossRow("-log sigmoid(beta w) - log sigmoid(-beta l)")
    APO_ZERO = "apo_zero", LossRow("sigmoid(-beta w) + sigmoid(beta l)")
    APO_DOWN = "apo_down", LossRow("sigmoid(beta w) + sigmoid(-beta Delta)")
    SIMPO = (
        "simpo",
        LossRow(
            "-(1 - epsilon) log sigmoid(m) - epsilon log sigmoid(-m), where m is beta times the mean log-prob of a"
            " chosen token minus beta times that of a rejected one minus `simpoGamma`; no reference",
            needs_reference=False,
            smooths=True,
            averages=True,
        ),
    )


def described() -> str:
    """Return every loss with its formula, for a field's description."""
    terms = "w and l are log-prob(policy) - log-prob(reference) of the chosen and of the rejected response"
    rest = "Delta is w - l, and epsilon is `labelSmoothing`"
    return f"{terms}, {rest}. {'; '.join(f'`{loss}`: {loss.row.formula}' for loss in Loss)}"


def one_of(losses: list[Loss]) -> str:
    """Return the losses' names as words: ``dpo, robust or simpo``."""
    *some, last = losses
    return f"{', '.join(some)} or {last}" if some else str(last)
