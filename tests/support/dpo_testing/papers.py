"""The losses written once more, from the papers, in other words than the trainer's: what the trainer is held to.

Scalars and Python loops in float64, probabilities instead of logits, library divergences instead of formulas.
Nothing here is imported from the trainer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from dpo_api.fields import Float
from dpo_api.spec import Dpo, Loss

SMOOTHING = 0.2


class Settings(Dpo):
    """A spec's ``dpo`` section, with every value that a loss reads away from its neutral one; see ``settings_of``."""

    beta: Float = 0.3
    gt_reward_scale: Float = 1.7


def settings_of(loss: Loss, **others: Any) -> Settings:
    """The settings of a loss, with its own fields set."""
    own: dict[str, Any] = {"label_smoothing": SMOOTHING} if loss.row.smooths else {}
    if loss is Loss.SIMPO:
        own["simpo_gamma"] = 0.7
    return Settings(**{"loss": loss, **own, **others})


@dataclass(frozen=True)
class PairOfResponses:
    """One pair: token log-probabilities of both responses under both models, and the data's rewards."""

    chosen: Tensor  # [n] float64, policy
    rejected: Tensor  # [m] float64, policy
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_reward: float
    rejected_reward: float


@dataclass(frozen=True)
class Given:
    """What the papers write a pair's loss in."""

    settings: Settings
    winner: Tensor  # log-ratio of policy and reference, of the chosen response
    loser: Tensor  # the same of the rejected one
    gap: float  # scaled difference of the data's rewards

    @property
    def beta(self) -> float:
        return self.settings.beta

    @property
    def flipped(self) -> float:
        """The probability that a label is wrong."""
        return self.settings.label_smoothing

    def wins(self, reward: Tensor | float) -> Tensor:
        """The probability of a win by this reward over one of 0."""
        return 1 / (1 + torch.exp(-torch.as_tensor(reward, dtype=torch.float64)))

    @property
    def model(self) -> Bernoulli:
        """Bradley-Terry: the probability that the winner wins, a softmax of the two implicit rewards."""
        both = torch.stack((self.beta * self.winner, self.beta * self.loser))
        return Bernoulli(probs=torch.softmax(both, dim=0)[0])

    @property
    def data(self) -> Bernoulli:
        """The same of the data's rewards."""
        return Bernoulli(probs=torch.tensor(1 / (1 + math.exp(-self.gap)), dtype=torch.float64))


@dataclass(frozen=True)
class Paper:
    """One loss: as its paper writes it, and by hand what it is while the policy equals the reference."""

    loss: Callable[[Given], Tensor]
    at_start: Callable[[float, float, float], float]  # of beta, the gap and the label smoothing


LN2 = math.log(2)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _unlikely(law: Bernoulli, outcome: float) -> Tensor:
    """Negative log-likelihood of an outcome."""
    found: Tensor = law.log_prob(torch.tensor(outcome, dtype=torch.float64))
    return -found


PAPERS: dict[Loss, Paper] = {
    # Rafailov et al.: negative log-likelihood of the preference; Mitchell: its mean over right and wrong labels
    Loss.DPO: Paper(
        lambda of: (1 - of.flipped) * _unlikely(of.model, 1) + of.flipped * _unlikely(of.model, 0), lambda *_: LN2
    ),
    # Azar et al.: regression of h onto τ⁻¹/2, h the difference of log ratios, τ = β
    Loss.IPO: Paper(
        lambda of: torch.pow((of.winner - of.loser) - (1 / of.beta) / 2, 2), lambda beta, *_: 1 / (4 * beta**2)
    ),
    # Nemotron-4: squared distance of implicit and given reward difference, or the divergence of the two laws
    Loss.RPO_SQ: Paper(
        lambda of: torch.pow(of.beta * of.winner - of.beta * of.loser - of.gap, 2), lambda _, gap, __: gap**2
    ),
    Loss.RPO_BWD_KL: Paper(
        lambda of: kl_divergence(of.data, of.model),
        lambda _, gap, __: LN2 + sum(p * math.log(p) for p in (_sigmoid(gap), _sigmoid(-gap))),
    ),
    Loss.RPO_FWD_KL: Paper(
        lambda of: kl_divergence(of.model, of.data),
        lambda _, gap, __: -LN2 - 0.5 * (math.log(_sigmoid(gap)) + math.log(_sigmoid(-gap))),
    ),
    # Chowdhury et al.: the estimate whose mean over flipped labels is the loss of the right ones
    Loss.ROBUST: Paper(
        lambda of: (
            ((1 - of.flipped) * _unlikely(of.model, 1) - of.flipped * _unlikely(of.model, 0)) / (1 - 2 * of.flipped)
        ),
        lambda *_: LN2,
    ),
    # Zhao et al., Liu et al.: hinge loss of the normalised likelihood ratio, with a margin of 1
    Loss.HINGE: Paper(lambda of: torch.clamp(1 - (of.beta * of.winner - of.beta * of.loser), min=0), lambda *_: 1.0),
    # Ji et al.: reverse KL of the policy's preference from the labels'
    Loss.EXO_PAIR: Paper(
        lambda of: kl_divergence(of.model, Bernoulli(probs=torch.tensor(1 - of.flipped, dtype=torch.float64))),
        lambda *rest: -LN2 - 0.5 * (math.log(1 - rest[2]) + math.log(rest[2])),
    ),
    # Chen et al.: each response against the reference, the chosen as data and both as noise
    Loss.NCA_PAIR: Paper(
        lambda of: (
            -(
                of.wins(of.beta * of.winner).log()
                + sum((1 - of.wins(of.beta * reward)).log() / 2 for reward in (of.winner, of.loser))
            )
        ),
        lambda *_: 2 * LN2,
    ),
    # Jung et al.: a classifier of chosen and rejected responses
    Loss.BCO_PAIR: Paper(
        lambda of: -of.wins(of.beta * of.winner).log() - (1 - of.wins(of.beta * of.loser)).log(), lambda *_: 2 * LN2
    ),
    # D'Oosterlinck et al.
    Loss.APO_ZERO: Paper(lambda of: 1 - of.wins(of.beta * of.winner) + of.wins(of.beta * of.loser), lambda *_: 1.0),
    Loss.APO_DOWN: Paper(lambda of: of.wins(of.beta * of.winner) + 1 - of.model.probs, lambda *_: 1.0),
    # Meng et al.: Bradley-Terry of length-normalised rewards with a target margin; no start is known in advance
    Loss.SIMPO: Paper(
        lambda of: (
            -(1 - of.flipped) * of.wins(of.beta * of.winner - of.beta * of.loser - of.settings.margin).log()
            - of.flipped * of.wins(of.settings.margin - of.beta * of.winner + of.beta * of.loser).log()
        ),
        lambda *_: math.nan,
    ),
}
"""A row for each loss."""


def preference(settings: Settings, pair: PairOfResponses) -> Tensor:
    """Preference loss of one pair, from the papers' own formulas."""

    average = settings.average_log_probs or settings.loss is Loss.SIMPO
    common = min(len(pair.chosen), len(pair.rejected))
    winner = _log_ratio(pair.chosen, pair.chosen_reference, common, settings, average=average)
    loser = _log_ratio(pair.rejected, pair.rejected_reference, common, settings, average=average)
    gap = settings.gt_reward_scale * (pair.chosen_reward - pair.rejected_reward)
    given = Given(settings, winner, loser, gap)
    return torch.stack([weight * PAPERS[loss].loss(given) for loss, weight in settings.parts]).sum()


def _log_ratio(policy: Tensor, reference: Tensor, common: int, settings: Settings, *, average: bool) -> Tensor:
    """log π − log π_ref of a response, or log π alone for SimPO."""
    if settings.loss is Loss.SIMPO:
        summed = policy.sum()
    else:  # Liu et al.: tokens beyond the shorter response weigh less
        weights = torch.ones(len(policy), dtype=torch.float64)
        if settings.ld_alpha is not None:
            weights[common:] = settings.ld_alpha
        summed = (weights * (policy - reference)).sum()
    return summed / max(len(policy), 1) if average else summed


def at_start(settings: Settings, gap: float) -> float:
    """Preference loss while policy = reference; ``gap`` is the difference of the data's rewards, not yet scaled."""
    arguments = (settings.beta, settings.gt_reward_scale * gap, settings.label_smoothing)
    return sum(weight * PAPERS[loss].at_start(*arguments) for loss, weight in settings.parts)


def batch_loss(settings: Settings, pairs: Sequence[PairOfResponses]) -> Tensor:
    """Loss of one global batch: weighted preference mean plus weighted SFT mean, as the spec words them."""
    loss = torch.zeros((), dtype=torch.float64)
    if settings.preference_weight != 0:
        loss = loss + settings.preference_weight * torch.stack([preference(settings, pair) for pair in pairs]).mean()
    if settings.sft_weight != 0:
        loss = loss + settings.sft_weight * sft(settings, pairs)
    return loss


def sft(settings: Settings, pairs: Sequence[PairOfResponses]) -> Tensor:
    """Mean negative log-likelihood of the chosen responses."""
    alone = settings.preference_weight == 0
    if alone and settings.sft_average_log_probs is None:
        return -torch.cat([pair.chosen for pair in pairs]).mean()
    average = settings.sft_average_log_probs
    if average is None:
        average = settings.average_log_probs or settings.loss is Loss.SIMPO
    per_pair = [pair.chosen.mean() if average and len(pair.chosen) else pair.chosen.sum() for pair in pairs]
    return -torch.stack(per_pair).mean()


def rewards(settings: Settings, pairs: Sequence[PairOfResponses]) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the chosen and the rejected responses, [P] each: β·Σ(log π − log π_ref); SimPO's: β·mean."""

    def of(pair: PairOfResponses, side: str) -> float:
        average = settings.loss is Loss.SIMPO
        common = min(len(pair.chosen), len(pair.rejected))
        policy, reference = getattr(pair, side).detach(), getattr(pair, f"{side}_reference")
        return settings.beta * float(_log_ratio(policy, reference, common, settings, average=average))

    chosen, rejected = ([of(pair, side) for pair in pairs] for side in ("chosen", "rejected"))
    return torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)


def some_pairs(
    seed: int = 0, lengths: Sequence[tuple[int, int]] = ((5, 2), (1, 7), (4, 4), (3, 9))
) -> list[PairOfResponses]:
    """Random pairs of unequal lengths and unequal rewards, some of them with the lower reward on the chosen side."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> Tensor:
        return -3 * torch.rand(count, generator=generator, dtype=torch.float64)

    given = [(2.0, 0.5), (0.25, 1.0), (-1.0, -1.75), (3.0, 2.5)]
    return [
        PairOfResponses(
            chosen=tokens(n).requires_grad_(),
            rejected=tokens(m).requires_grad_(),
            chosen_reference=tokens(n),
            rejected_reference=tokens(m),
            chosen_reward=given[index % len(given)][0],
            rejected_reward=given[index % len(given)][1],
        )
        for index, (n, m) in enumerate(lengths)
    ]
