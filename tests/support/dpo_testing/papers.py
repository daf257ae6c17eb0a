"""The losses written once more, from the papers, in other words than the trainer's: what the trainer is held to.

Scalars and Python loops in float64, probabilities instead of logits, library divergences instead of formulas.
Nothing here is imported from the trainer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence


@dataclass(frozen=True)
class Settings:
    """The loss settings of a spec, with every value away from its neutral one."""

    loss: str = "dpo"
    beta: float = 0.3
    preference_weight: float = 1.0
    sft_weight: float = 0.0
    average_log_probs: bool = False
    sft_average_log_probs: bool | None = None
    gt_reward_scale: float = 1.7


@dataclass(frozen=True)
class PairOfResponses:
    """One pair: token log-probabilities of both responses under both models, and the data's rewards."""

    chosen: Tensor  # [n] float64, policy
    rejected: Tensor  # [m] float64, policy
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_reward: float
    rejected_reward: float


def preference(settings: Settings, pair: PairOfResponses) -> Tensor:
    """Preference loss of one pair, from the papers' own formulas."""
    beta = settings.beta

    def log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
        summed = policy.sum() - reference.sum()
        return summed / max(len(policy), 1) if settings.average_log_probs else summed

    winner = log_ratio(pair.chosen, pair.chosen_reference)
    loser = log_ratio(pair.rejected, pair.rejected_reference)
    gap = settings.gt_reward_scale * (pair.chosen_reward - pair.rejected_reward)
    # Bradley-Terry: the probability that the winner wins, a softmax of the two implicit rewards.
    model = Bernoulli(probs=torch.softmax(torch.stack((beta * winner, beta * loser)), dim=0)[0])
    data = Bernoulli(probs=torch.tensor(1 / (1 + math.exp(-gap)), dtype=torch.float64))
    match settings.loss:
        case "dpo":  # Rafailov et al.: negative log-likelihood of the preference
            likelihood: Tensor = model.log_prob(torch.tensor(1.0, dtype=torch.float64))
            return -likelihood
        case "ipo":  # Azar et al.: regression of h onto τ⁻¹/2, h the difference of log ratios, τ = β
            return torch.pow((winner - loser) - (1 / beta) / 2, 2)
        case "rpo_sq":  # Nemotron-4: squared distance of implicit and given reward difference
            return torch.pow(beta * winner - beta * loser - gap, 2)
        case "rpo_bwd_kl":
            return kl_divergence(data, model)
        case "rpo_fwd_kl":
            return kl_divergence(model, data)
    raise ValueError(settings.loss)


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
