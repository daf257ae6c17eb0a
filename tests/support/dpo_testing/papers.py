"""The losses written once more, from the papers, in other words than the trainer's: what the trainer is held to.

Scalars and Python loops in float64, probabilities instead of logits, library divergences instead of formulas.
Nothing here is imported from the trainer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from dpo_api.fields import Float
from dpo_api.spec import Dpo, Loss


class Settings(Dpo):
    """A spec's ``dpo`` section, with every value that a loss reads away from its neutral one."""

    beta: Float = 0.3
    gt_reward_scale: Float = 1.7


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

    beta: float
    winner: Tensor  # log-ratio of policy and reference, of the chosen response
    loser: Tensor  # the same of the rejected one
    gap: float  # scaled difference of the data's rewards

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
    at_start: Callable[[float, float], float]  # of beta and the gap


LN2 = math.log(2)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


PAPERS: dict[Loss, Paper] = {
    # Rafailov et al.: negative log-likelihood of the preference
    Loss.DPO: Paper(lambda of: -of.model.log_prob(torch.tensor(1.0, dtype=torch.float64)), lambda *_: LN2),
    # Azar et al.: regression of h onto τ⁻¹/2, h the difference of log ratios, τ = β
    Loss.IPO: Paper(
        lambda of: torch.pow((of.winner - of.loser) - (1 / of.beta) / 2, 2), lambda beta, _: 1 / (4 * beta**2)
    ),
    # Nemotron-4: squared distance of implicit and given reward difference, or the divergence of the two laws
    Loss.RPO_SQ: Paper(
        lambda of: torch.pow(of.beta * of.winner - of.beta * of.loser - of.gap, 2), lambda _, gap: gap**2
    ),
    Loss.RPO_BWD_KL: Paper(
        lambda of: kl_divergence(of.data, of.model),
        lambda _, gap: LN2 + sum(p * math.log(p) for p in (_sigmoid(gap), _sigmoid(-gap))),
    ),
    Loss.RPO_FWD_KL: Paper(
        lambda of: kl_divergence(of.model, of.data),
        lambda _, gap: -LN2 - 0.5 * (math.log(_sigmoid(gap)) + math.log(_sigmoid(-gap))),
    ),
}
"""A row for each loss."""


def preference(settings: Settings, pair: PairOfResponses) -> Tensor:
    """Preference loss of one pair, from the papers' own formulas."""

    def log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
        summed = policy.sum() - reference.sum()
        return summed / max(len(policy), 1) if settings.average_log_probs else summed

    winner = log_ratio(pair.chosen, pair.chosen_reference)
    loser = log_ratio(pair.rejected, pair.rejected_reference)
    gap = settings.gt_reward_scale * (pair.chosen_reward - pair.rejected_reward)
    return PAPERS[settings.loss].loss(Given(settings.beta, winner, loser, gap))


def at_start(settings: Settings, gap: float) -> float:
    """Preference loss while policy = reference; ``gap`` is the difference of the data's rewards, not yet scaled."""
    return PAPERS[settings.loss].at_start(settings.beta, settings.gt_reward_scale * gap)


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
    average = settings.average_log_probs if settings.sft_average_log_probs is None else settings.sft_average_log_probs
    per_pair = [pair.chosen.mean() if average and len(pair.chosen) else pair.chosen.sum() for pair in pairs]
    return -torch.stack(per_pair).mean()


def rewards(settings: Settings, pairs: Sequence[PairOfResponses]) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the chosen and the rejected responses, [P] each: β·Σ(log π − log π_ref)."""
    chosen = [settings.beta * (pair.chosen - pair.chosen_reference).sum().item() for pair in pairs]
    rejected = [settings.beta * (pair.rejected - pair.rejected_reference).sum().item() for pair in pairs]
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
