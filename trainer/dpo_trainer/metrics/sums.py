"""Metrics as numerators and denominators, which are summed over packs and ranks and divided once.

Each metric has a fixed row. A rank adds its packs' tables, one all-reduce adds the ranks', and ``means`` divides. A
metric that a run does not have (rewards for SFT alone, sft_loss at weight 0) has denominator 0 and is left out.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_trainer.losses import PairLosses

ROWS = (
    "loss",
    "sft_loss",
    "preference_loss",
    "preference_loss_at_start",
    "acc",
    "rewards_chosen",
    "rewards_rejected",
    "rewards_all",
    "rewards_all_square",
)
"""The rows of a table of sums, [len(ROWS), 2] float64: numerator, denominator."""

_START = "preference_loss_at_start"


def metric_sums(losses: PairLosses) -> Tensor:
    """Return the table of one pack, [len(ROWS), 2] float64, without gradient. Filler pairs count for nothing.

    ========================  ===========================================  =======================================
    row                       numerator                                    denominator
    ========================  ===========================================  =======================================
    loss                      Σ ``total``                                  pairs (SFT alone: see losses._sft_term)
    sft_loss                  Σ −log π(chosen), unweighted                 the loss's
    preference_loss           Σ preference loss, unweighted                pairs
    preference_loss_at_start  Σ preference loss if policy = reference      pairs
    acc                       pairs with chosen reward > rejected reward   pairs
    rewards_chosen            Σ chosen reward                              pairs
    rewards_rejected          Σ rejected reward                            pairs
    rewards_all               Σ reward of both responses                   responses (2 a pair)
    rewards_all_square        Σ square of those                            responses
    ========================  ===========================================  =======================================
    """
    zero = torch.zeros((), dtype=torch.float64, device=losses.total.device)
    pairs = losses.real.sum().double()
    per_loss = losses.denominator.sum().double()
    table = dict.fromkeys(ROWS, (zero, zero))
    table["loss"] = (losses.total.detach().double().sum(), per_loss)
    if losses.sft is not None:
        table["sft_loss"] = (losses.sft.double().sum(), per_loss)
    if losses.preference is not None:
        table["preference_loss"] = (losses.preference.double().sum(), pairs)
    if losses.preference_at_start is not None:
        table["preference_loss_at_start"] = (losses.preference_at_start.double().sum(), pairs)
    if losses.chosen_reward is not None and losses.rejected_reward is not None:
        chosen, rejected = losses.chosen_reward.double(), losses.rejected_reward.double()
        table["acc"] = ((chosen > rejected).double().sum(), pairs)  # a filler's rewards are equal: 0 and 0
        table["rewards_chosen"] = (chosen.sum(), pairs)
        table["rewards_rejected"] = (rejected.sum(), pairs)
        table["rewards_all"] = (chosen.sum() + rejected.sum(), 2 * pairs)
        table["rewards_all_square"] = (chosen.square().sum() + rejected.square().sum(), 2 * pairs)
    return torch.stack([torch.stack(table[row]) for row in ROWS])


def empty_sums(device: torch.device | str = "cpu") -> Tensor:
    """Return a table of zeros, [len(ROWS), 2] float64, to which ranks add their packs."""
    return torch.zeros(len(ROWS), 2, dtype=torch.float64, device=device)


def means(table: Tensor | Sequence[Sequence[float]]) -> dict[str, float]:
    """Divide the global sums: the metrics by their names without the ``train/`` or ``val/`` group.

    Each row's mean under its own name, rewards with ``_mean``; ``rewards_margin`` = chosen mean − rejected mean;
    ``rewards_all_std``: sample standard deviation (divisor 2N − 1, as torch.std and NeMo) of all 2N rewards. Rows
    without a denominator are left out, and so is ``loss_at_start``. NaN and infinities pass through; each writer
    decides what to do with them.
    """
    sums = _sums(table)
    sums.pop(_START, None)
    result = {row: top / bottom for row, (top, bottom) in sums.items() if not row.startswith("rewards")}
    if "rewards_all" not in sums:
        return result
    for row in ("rewards_chosen", "rewards_rejected", "rewards_all"):
        result[f"{row}_mean"] = sums[row][0] / sums[row][1]
    result["rewards_margin"] = result["rewards_chosen_mean"] - result["rewards_rejected_mean"]
    total, count = sums["rewards_all"]
    variance = (sums["rewards_all_square"][0] - total * total / count) / (count - 1)
    # Rounding can take a variance of 0 below it; max(nan, 0) would hide a NaN.
    result["rewards_all_std"] = math.sqrt(variance) if variance > 0 else variance * 0.0
    return result


def loss_at_start(table: Tensor | Sequence[Sequence[float]]) -> float | None:
    """Return the ``preference_loss`` of these pairs while the policy equals its reference; None without a reference.

    It is not a metric. The first step's loss is compared with it.
    """
    sums = _sums(table)
    return sums[_START][0] / sums[_START][1] if _START in sums else None


def _sums(table: Tensor | Sequence[Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Return the sums of the rows that the run has, by name."""
    rows = table.tolist() if isinstance(table, Tensor) else table
    return {row: (float(top), float(bottom)) for row, (top, bottom) in zip(ROWS, rows, strict=True) if bottom > 0}
