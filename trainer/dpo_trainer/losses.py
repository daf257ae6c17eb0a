"""The preference losses and the SFT term: one pure function for each loss, which returns one value per pair.

Notation: P pairs; w and l = log π − log π_ref of the chosen and of the rejected response, each log-probability summed
over the response (or its per-token mean with ``average_log_probs``); Δ = w − l; β the spec's ``dpo.beta``; ε its
``label_smoothing``; γ its ``simpo_gamma``; g the reward gap ``gt_reward_scale · (chosen reward − rejected reward)`` of
the data; σ the logistic function; Bern(p) the Bernoulli law.

Sources: DPO, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; with ε, conservative DPO, Mitchell 2023 ("A note on DPO
with noisy preferences & relationship to IPO"); IPO, Azar et al. 2023 (arXiv:2310.12036), eq. 17; reward-aware
preference optimization (RPO), Nemotron-4 340B report (arXiv:2406.11704), whose distance is a choice of three here;
robust DPO, Chowdhury et al. 2024 (arXiv:2403.00409); hinge, SLiC with the likelihood ratio as in RSO, Liu et al.
2023 (arXiv:2309.06657); EXO, Ji et al. 2024 (arXiv:2402.00856), eq. 16; NCA, Chen et al. 2024
(arXiv:2402.05369), for pairs; BCO, Jung et al. 2024 (arXiv:2404.04656), without its shift of rewards, as in TRL; APO,
D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7 and 8; SimPO, Meng et al. 2024 (arXiv:2405.14734).

Every mean of the run is over the *global* batch, so this module does not divide. Each value has a numerator and a
denominator; the caller sums both over packs, ranks and micro-batches, and divides once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dpo_api.spec import Dpo, Loss


@dataclass(frozen=True)
class Terms:
    """The inputs of a loss for P pairs."""

    chosen: Tensor  #: [P]; w
    rejected: Tensor  #: [P]; l
    reward_gap: Tensor  #: [P]; g

    @property
    def delta(self) -> Tensor:
        """Δ, [P]."""
        return self.chosen - self.rejected


def dpo_loss(of: Terms, dpo: Dpo) -> Tensor:
    """−(1 − ε) log σ(βΔ) − ε log σ(−βΔ). Returns [P]."""
    return _cross_entropy(dpo.beta * of.delta, dpo.label_smoothing)


def ipo_loss(of: Terms, dpo: Dpo) -> Tensor:
    """(Δ − 1/(2β))². Returns [P]. Log-probs are summed over tokens as in NeMo, where TRL averages them."""
    return (of.delta - 1 / (2 * dpo.beta)).square()


def rpo_sq_loss(of: Terms, dpo: Dpo) -> Tensor:
    """(βΔ − g)². Returns [P]."""
    return (dpo.beta * of.delta - of.reward_gap).square()


def rpo_bwd_kl_loss(of: Terms, dpo: Dpo) -> Tensor:
    """KL( Bern(σ(g)) ‖ Bern(σ(βΔ)) ). Returns [P]."""
    return _bernoulli_kl(of.reward_gap, dpo.beta * of.delta)


def rpo_fwd_kl_loss(of: Terms, dpo: Dpo) -> Tensor:
    """KL( Bern(σ(βΔ)) ‖ Bern(σ(g)) ). Returns [P]."""
    return _bernoulli_kl(dpo.beta * of.delta, of.reward_gap)


def robust_loss(of: Terms, dpo: Dpo) -> Tensor:
    """(−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε). Returns [P]; it can be negative."""
    logit, smoothing = dpo.beta * of.delta, dpo.label_smoothing
    return (smoothing * logsigmoid(-logit) - (1 - smoothing) * logsigmoid(logit)) / (1 - 2 * smoothing)


def hinge_loss(of: Terms, dpo: Dpo) -> Tensor:
    """max(0, 1 − βΔ). Returns [P]."""
    return relu(1 - dpo.beta * of.delta)


def exo_pair_loss(of: Terms, dpo: Dpo) -> Tensor:
    """KL( Bern(σ(βΔ)) ‖ Bern(1 − ε) ). Returns [P]; ε > 0."""
    logit = dpo.beta * of.delta
    smoothing = dpo.label_smoothing
    return _bernoulli_kl(logit, torch.full_like(logit, math.log1p(-smoothing) - math.log(smoothing)))


def nca_pair_loss(of: Terms, dpo: Dpo) -> Tensor:
    """−log σ(βw) − ½ log σ(−βw) − ½ log σ(−βl). Returns [P]."""
    chosen, rejected = dpo.beta * of.chosen, dpo.beta * of.rejected
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def bco_pair_loss(of: Terms, dpo: Dpo) -> Tensor:
    """−log σ(βw) − log σ(−βl). Returns [P]."""
    return -logsigmoid(dpo.beta * of.chosen) - logsigmoid(-dpo.beta * of.rejected)


def apo_zero_loss(of: Terms, dpo: Dpo) -> Tensor:
    """σ(−βw) + σ(βl): the chosen response becomes more probable, the rejected one less. Returns [P]."""
    return (-dpo.beta * of.chosen).sigmoid() + (dpo.beta * of.rejected).sigmoid()


def apo_down_loss(of: Terms, dpo: Dpo) -> Tensor:
    """σ(βw) + σ(−βΔ): both responses become less probable, the rejected one more so. Returns [P]."""
    return (dpo.beta * of.chosen).sigmoid() + (-dpo.beta * of.delta).sigmoid()


def simpo_loss(of: Terms, dpo: Dpo) -> Tensor:
    """−(1 − ε) log σ(βΔ − γ) − ε log σ(γ − βΔ); w and l are per-token means of log π. Returns [P]."""
    return _cross_entropy(dpo.beta * of.delta - dpo.margin, dpo.label_smoothing)


def _cross_entropy(logit: Tensor, smoothing: float) -> Tensor:
    """−(1 − ε) log σ(x) − ε log σ(−x); [P] -> [P]."""
    return -(1 - smoothing) * logsigmoid(logit) - smoothing * logsigmoid(-logit)


def _bernoulli_kl(p_logit: Tensor, q_logit: Tensor) -> Tensor:
    """KL( Bern(σ(p)) ‖ Bern(σ(q)) ) of logits; [P], [P] -> [P].

    Computed from log σ of both signs. In fp32, probabilities round to 0 or 1 beyond |logit| ≈ 17 and their logs become
    −∞, while log σ stays finite (≈ −|logit|) and is multiplied by a factor that is then 0.
    """
    heads = p_logit.sigmoid() * (logsigmoid(p_logit) - logsigmoid(q_logit))
    tails = (-p_logit).sigmoid() * (logsigmoid(-p_logit) - logsigmoid(-q_logit))
    return heads + tails


PREFERENCE_LOSSES: Mapping[Loss, Callable[[Terms, Dpo], Tensor]] = {
    Loss.DPO: dpo_loss,
    Loss.IPO: ipo_loss,
    Loss.RPO_SQ: rpo_sq_loss,
    Loss.RPO_BWD_KL: rpo_bwd_kl_loss,
    Loss.RPO_FWD_KL: rpo_fwd_kl_loss,
    Loss.ROBUST: robust_loss,
    Loss.HINGE: hinge_loss,
    Loss.EXO_PAIR: exo_pair_loss,
    Loss.NCA_PAIR: nca_pair_loss,
    Loss.BCO_PAIR: bco_pair_loss,
    Loss.APO_ZERO: apo_zero_loss,
    Loss.APO_DOWN: apo_down_loss,
    Loss.SIMPO: simpo_loss,
}
"""The function of each loss, per pair and unweighted. Its other properties are in ``Loss.row``."""


def preference_loss(of: Terms, dpo: Dpo) -> Tensor:
    """Return the weighted sum of the spec's losses, [P]."""
    first, *others = (weight * PREFERENCE_LOSSES[loss](of, dpo) for loss, weight in dpo.parts)
    return sum(others, start=first)


@dataclass(frozen=True)
class PairLosses:
    """Per-pair terms of P pairs; a filler pair is 0 in every field.

    The loss is Σ ``total`` / Σ ``denominator`` over the global batch. The reported means are computed in the same way
    with the denominators named in the comments. Only ``total`` has a gradient.
    """

    total: Tensor  #: [P]; numerators of the loss, the only field with a gradient
    denominator: Tensor  #: [P] int64; 1 per pair, or its chosen tokens if SFT alone averages over tokens
    real: Tensor  #: [P] bool; False for a filler pair
    preference: Tensor | None  #: [P], unweighted, over pairs; None for SFT alone
    preference_at_start: Tensor | None  #: [P], the same if Δ were 0 (policy = reference); None without a reference
    sft: Tensor | None  #: [P], unweighted, over ``denominator``; None when ``sft_weight`` is 0
    chosen_reward: Tensor | None  #: [P], β·Σ_response(log π − log π_ref), over pairs; None for SFT alone. A loss
    #: without a reference has no π_ref here, and one that always averages has the per-token mean for the sum.
    rejected_reward: Tensor | None  #: [P], the same of the rejected response


def pair_losses(
    policy_sums: Tensor,
    policy_counts: Tensor,
    reference_sums: Tensor | None,
    rewards: Tensor,
    settings: Dpo,
    real: Tensor | None = None,
    tails: Tensor | None = None,
) -> PairLosses:
    """Per-pair losses and rewards; column 0 is the chosen and column 1 the rejected response.

    policy_sums: [P, 2], Σ log π over each response's tokens, with gradient. policy_counts: [P, 2] int64, response
    tokens. reference_sums: [P, 2], Σ log π_ref, constants; ignored, and may be None, if ``settings`` need no reference:
    Δ is then that of the policy alone. rewards: [P, 2], the data's rewards or the spec's defaults. real: [P] bool,
    False for filler pairs (None: all real). The inputs of fillers are masked, so that a NaN in them cannot reach the
    loss or a gradient. tails: [P, 2], the part of the policy's sums that comes from tokens beyond the shorter response;
    needed with ``ld_alpha``, and ``reference_sums`` are then weighted already (``desensitized``).

    All results have the sums' dtype. ``sums_by_owner`` returns float64: for two sums near −2,000 that differ by 1, fp32
    keeps only 4 digits of the difference. The formulas themselves are safe in fp32 at |βΔ| = 1e4.
    """
    if real is None:
        real = torch.ones(policy_sums.shape[0], dtype=torch.bool, device=policy_sums.device)
    keep = real.unsqueeze(1)  # [P, 1]
    policy = torch.where(keep, policy_sums, 0.0)
    counts = torch.where(keep, policy_counts, 0)
    lengths = counts.clamp(min=1)  # as in NeMo: an empty response divides by one token

    sft, denominator = _sft_term(policy[:, 0], counts[:, 0], settings, real)
    if not settings.has_preference:
        return PairLosses(settings.sft_weight * sft, denominator, real, None, None, sft.detach(), None, None)
    gains = desensitized(policy, None if tails is None else torch.where(keep, tails, 0.0), settings)  # [P, 2]
    if settings.needs_reference:
        if reference_sums is None:
            raise ValueError(f"the loss {settings.loss_name} needs the reference's log-probabilities")
        gains = gains - torch.where(keep, reference_sums, 0.0)
    rewarded = gains / lengths if settings.rewards_are_means else gains
    implicit = settings.beta * rewarded.detach()  # [P, 2]; rewards are only reported, so they have no gradient
    if settings.averages:
        gains = gains / lengths
    known = torch.where(keep, rewards, 0.0).to(gains.dtype)
    gap = settings.gt_reward_scale * (known[:, 0] - known[:, 1])
    # A filler has w = l = 0, where the losses are finite but not zero.
    preference = torch.where(real, preference_loss(Terms(gains[:, 0], gains[:, 1], gap), settings), 0.0)
    at_start = None
    if settings.needs_reference:
        equal = torch.zeros_like(gap)
        at_start = torch.where(real, preference_loss(Terms(equal, equal, gap), settings), 0.0)
    total = settings.preference_weight * preference
    if settings.sft_weight != 0:
        total = total + settings.sft_weight * sft
    reported = sft.detach() if settings.sft_weight != 0 else None
    return PairLosses(total, denominator, real, preference.detach(), at_start, reported, implicit[:, 0], implicit[:, 1])


def desensitized(sums: Tensor, tails: Tensor | None, settings: Dpo) -> Tensor:
    """Weigh the tokens beyond the shorter response of a pair: Σ_common log π + α Σ_beyond log π; [P, 2] -> [P, 2].

    sums: over all tokens. tails: over those beyond, needed with ``ld_alpha``, which is α. LD-DPO, Liu et al. 2024
    (arXiv:2409.06411).
    """
    if not settings.splits_tails:
        return sums
    if tails is None or settings.ld_alpha is None:
        raise ValueError("ld_alpha needs the sums of the tokens beyond the shorter response")
    return sums - (1 - settings.ld_alpha) * tails


def _sft_term(chosen: Tensor, counts: Tensor, settings: Dpo, real: Tensor) -> tuple[Tensor, Tensor]:
    """−log π(chosen): numerators [P] with gradient, denominators [P] int64.

    Per pair the sum, or the per-token mean with ``sft_average_log_probs`` (not set: as the preference loss); the
    denominator counts pairs. For SFT alone with the field not set, the denominator counts the chosen tokens of the
    global batch, so that every token has the same weight.
    """
    per_token = settings.sft_average_log_probs
    if per_token is None:
        if not settings.has_preference:
            return -chosen, counts
        per_token = settings.averages
    values = chosen / counts.clamp(min=1) if per_token else chosen
    return -values, real.to(torch.int64)
