"""The losses against the papers, and the checks themselves against wrong losses."""

import math

import pytest
import torch

from dpo_api.spec import Loss
from dpo_testing import loss_parity, papers
from dpo_testing.papers import Settings
from dpo_trainer import losses
from dpo_trainer.logprobs import sums_by_owner
from dpo_trainer.metrics.sums import loss_at_start, metric_sums


@pytest.mark.parametrize("settings", list(loss_parity.settings_grid()), ids=str)
def test_value_gradient_and_rewards_match_the_papers(settings: Settings) -> None:
    loss_parity.check_setting(losses, settings)


def test_figures_are_detached_and_sft_alone_needs_no_reference() -> None:
    loss_parity.check_detached(losses)


def test_filler_pairs_weigh_nothing() -> None:
    loss_parity.check_filler(losses)


def test_empty_response_is_no_division_by_zero() -> None:
    loss_parity.check_empty_response(losses)


def test_fp32_is_safe_at_extreme_arguments() -> None:
    loss_parity.check_extreme(losses)


@pytest.mark.parametrize("loss", [loss for loss in Loss if loss.row.needs_reference])
def test_first_step_has_its_closed_form(loss: Loss) -> None:
    gap, settings = 0.75, papers.settings_of(loss)
    expected = papers.at_start(settings, gap)
    sums = torch.tensor([[-12.0, -31.0]], dtype=torch.float64)
    result = losses.pair_losses(sums, torch.tensor([[3, 8]]), sums, torch.tensor([[1.0, 0.25]]), settings)
    assert float(result.total) == pytest.approx(expected, rel=1e-12)
    assert result.preference_at_start is not None
    assert float(result.preference_at_start) == pytest.approx(expected, rel=1e-12)


def test_both_branches_receive_gradient_through_token_sums() -> None:
    """From tokens in fp32 through sums_by_owner to the loss: each response's tokens move in its own direction."""
    pairs = papers.some_pairs()
    tokens = torch.cat([t for p in pairs for t in (p.chosen, p.rejected)]).detach().float().requires_grad_()
    owners = torch.cat(
        [torch.full((len(t),), 2 * i + k) for i, p in enumerate(pairs) for k, t in enumerate((p.chosen, p.rejected))]
    )
    sums, counts = sums_by_owner(tokens, owners, 2 * len(pairs))
    _, _, reference, given = loss_parity.inputs(pairs)
    result = losses.pair_losses(sums.view(-1, 2), counts.view(-1, 2), reference, given, Settings())
    (gradient,) = torch.autograd.grad(result.total.sum(), tokens)
    assert gradient.dtype == torch.float32
    assert bool((gradient[owners % 2 == 0] < 0).all())
    assert bool((gradient[owners % 2 == 1] > 0).all())


def test_small_differences_of_long_responses_survive() -> None:
    """Two sums near −2,000: their difference is right to 1e-6, where fp32 sums would be off by 1e-4."""
    generator = torch.Generator().manual_seed(5)
    policy = -torch.rand(4000, generator=generator)
    reference = policy.double() + 1e-4 * torch.rand(4000, generator=generator, dtype=torch.float64)
    owners = torch.arange(4000) % 2
    sums, counts = sums_by_owner(policy, owners, 2)
    reference_sums = torch.stack((reference[0::2].sum(), reference[1::2].sum()))
    settings = Settings(beta=1.0)
    result = losses.pair_losses(
        sums.view(1, 2), counts.view(1, 2), reference_sums.view(1, 2), torch.zeros(1, 2), settings
    )
    assert result.chosen_reward is not None
    exact = (policy.double() - reference)[0::2].sum()
    assert float(result.chosen_reward) == pytest.approx(float(exact), abs=1e-6)


def test_every_loss_has_a_function_and_a_paper() -> None:
    assert set(losses.PREFERENCE_LOSSES) == set(papers.PAPERS) == set(Loss)


def test_a_loss_without_a_reference_compares_the_policy_alone() -> None:
    sums = torch.tensor([[-12.0, -31.0]], dtype=torch.float64)
    settings = Settings(loss="simpo", beta=2.0, simpo_gamma=0.5)
    result = losses.pair_losses(sums, torch.tensor([[3, 8]]), None, torch.zeros(1, 2), settings)
    chosen, rejected = 2 * -12 / 3, 2 * -31 / 8
    assert float(result.total) == pytest.approx(math.log1p(math.exp(-(chosen - rejected - 0.5))), rel=1e-12)
    assert [float(result.chosen_reward), float(result.rejected_reward)] == [chosen, rejected]  # type: ignore[arg-type]
    assert result.preference_at_start is None
    assert loss_at_start(metric_sums(result)) is None


def test_robust_dpo_is_the_mean_of_right_labels_where_some_are_flipped() -> None:
    """The mean of its value at Δ and at −Δ, by how often labels are flipped, is the loss without mistakes."""
    w = torch.tensor([1.7, -0.4, 3.0], dtype=torch.float64)
    nothing = torch.zeros_like(w)
    noisy, clean = Settings(loss="robust", label_smoothing=0.3), Settings()
    right = losses.robust_loss(losses.Terms(w, nothing, nothing), noisy)
    wrong = losses.robust_loss(losses.Terms(nothing, w, nothing), noisy)
    expected = losses.dpo_loss(losses.Terms(w, nothing, nothing), clean)
    torch.testing.assert_close(0.7 * right + 0.3 * wrong, expected)
