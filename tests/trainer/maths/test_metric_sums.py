"""Sums become the metrics of the global batch, however pairs are split into packs and ranks."""

import math

import pytest
import torch
from torch import Tensor

from dpo_api.spec import Loss
from dpo_testing import loss_parity, papers
from dpo_testing.papers import Settings
from dpo_trainer import losses
from dpo_trainer.metrics.sums import ROWS, empty_sums, loss_at_start, means, metric_sums


def table_of(settings: Settings, splits: list[list[int]]) -> Tensor:
    """The sums of the test's four pairs when each list is one pack; -1 is a filler."""
    arguments = [tensor.detach() for tensor in loss_parity.inputs(papers.some_pairs())]
    table = empty_sums()
    for pack in splits:
        rows = [max(index, 0) for index in pack]
        policy, counts, reference, given = (tensor[rows] for tensor in arguments)
        real = torch.tensor([index >= 0 for index in pack])
        table += metric_sums(losses.pair_losses(policy, counts, reference, given, settings, real))
    return table


def metrics_of(settings: Settings, splits: list[list[int]]) -> dict[str, float]:
    return means(table_of(settings, splits))


def test_metrics_match_plain_statistics() -> None:
    settings = Settings(sft_weight=0.5)
    pairs = papers.some_pairs()
    chosen, rejected = papers.rewards(settings, pairs)
    every = torch.cat((chosen, rejected))
    assert 0 < int((chosen > rejected).sum()) < 4, "the data must tell > from < and from ≥"
    expected = {
        "loss": float(papers.batch_loss(settings, pairs).detach()),
        "sft_loss": float(papers.sft(settings, pairs).detach()),
        "preference_loss": float(papers.batch_loss(Settings(), pairs).detach()),
        "acc": float((chosen > rejected).double().mean()),
        "rewards_chosen_mean": float(chosen.mean()),
        "rewards_rejected_mean": float(rejected.mean()),
        "rewards_all_mean": float(every.mean()),
        "rewards_margin": float((chosen - rejected).mean()),
        "rewards_all_std": float(every.std()),
    }
    assert metrics_of(settings, [[0, 1, 2, 3]]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "splits", [[[0], [1, 2, 3]], [[3, 1], [2, 0], [-1]], [[-1, 0, -1], [1], [2, -1], [3]]], ids=str
)
@pytest.mark.parametrize(
    "settings",
    [Settings(loss="ipo", sft_weight=0.5), Settings(preference_weight=0.0, sft_weight=2.0)],
    ids=["preference", "sft alone"],
)
def test_splitting_and_fillers_change_nothing(settings: Settings, splits: list[list[int]]) -> None:
    assert metrics_of(settings, splits) == pytest.approx(metrics_of(settings, [[0, 1, 2, 3]]), rel=1e-12)


@pytest.mark.parametrize("loss", [loss for loss in Loss if loss.row.needs_reference])
@pytest.mark.parametrize("splits", [[[0, 1, 2, 3]], [[3, 1], [2, 0, -1], [-1]]], ids=str)
def test_the_first_loss_of_the_batch_is_the_mean_over_its_pairs(loss: Loss, splits: list[list[int]]) -> None:
    settings = papers.settings_of(loss)
    each = [papers.at_start(settings, pair.chosen_reward - pair.rejected_reward) for pair in papers.some_pairs()]
    assert loss_at_start(table_of(settings, splits)) == pytest.approx(sum(each) / 4, rel=1e-12)


def test_sft_alone_has_no_reward_metrics_and_averages_over_tokens() -> None:
    pairs = papers.some_pairs()
    result = metrics_of(Settings(preference_weight=0.0, sft_weight=2.0), [[0, 1], [2, 3]])
    assert set(result) == {"loss", "sft_loss"}
    assert loss_at_start(table_of(Settings(preference_weight=0.0, sft_weight=2.0), [[0]])) is None
    per_token = -torch.cat([pair.chosen for pair in pairs]).mean().item()
    assert result["sft_loss"] == pytest.approx(per_token, rel=1e-12)
    assert result["loss"] == pytest.approx(2 * per_token, rel=1e-12)


def test_equal_rewards_are_not_accurate() -> None:
    sums = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    result = losses.pair_losses(sums, torch.ones(1, 2, dtype=torch.int64), sums, torch.zeros(1, 2), Settings())
    figures = means(metric_sums(result))
    assert figures["acc"] == 0
    assert figures["rewards_all_std"] == 0


def test_nan_is_not_hidden() -> None:
    table = torch.ones(len(ROWS), 2, dtype=torch.float64)
    table[ROWS.index("rewards_all_square"), 0] = torch.nan
    table[:, 1] = 2
    assert math.isnan(means(table)["rewards_all_std"])
    assert means(empty_sums()) == {}
