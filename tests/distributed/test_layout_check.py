"""The comparison of a layout with one rank, which a run makes before its first step."""

import math
from pathlib import Path

import pytest
import torch

from dpo_api.sizing import Layout
from dpo_testing.gloo import run_ranks
from dpo_testing.layout_ranks import check, run_wrongly
from dpo_testing.models import reference_model, save_folder
from dpo_testing.runs import merged
from dpo_testing.sizes import LLAMA_8B, sized
from dpo_testing.training_world import make
from dpo_trainer.layout_check import Numbers, judge, too_large


def numbers(log_probs: float = -50.0, gradient: tuple[float, ...] = (2.0, 1.0, -1.0)) -> Numbers:
    return Numbers(torch.full((4, 2), log_probs, dtype=torch.float64), {"head": torch.tensor(gradient).double()})


def test_equal_numbers_are_verified() -> None:
    verdict = judge(numbers(), numbers(), None)
    assert (verdict.verified, verdict.log_probs, verdict.gradients) == (True, 0.0, 0.0)


@pytest.mark.parametrize("log_prob", [-50.0 * (1 + 2e-4), math.nan])
def test_other_log_probs_are_wrong(log_prob: float) -> None:
    verdict = judge(numbers(log_prob), numbers(), None)
    assert verdict.verified is False
    assert "log-probs differ by" in verdict.reason


@pytest.mark.parametrize("gradient", [(2.0, 1.0, -0.999), (2.0, 1.0, math.nan)])
def test_another_gradient_is_wrong_and_named(gradient: tuple[float, ...]) -> None:
    verdict = judge(numbers(gradient=gradient), numbers(), None)
    assert verdict.verified is False
    assert "the gradient of head differs by" in verdict.reason


@pytest.mark.parametrize(("layout", "verified"), [(-50.2, True), (-50.4, False)])
def test_bf16_is_measured_by_its_own_distance_from_fp32(layout: float, verified: bool) -> None:
    """One rank's bf16 is 0.1 from fp32, so the layout may be 0.3 from it."""
    assert judge(numbers(layout), numbers(-50.0), numbers(-50.1)).verified is verified


def test_a_comparison_that_takes_more_memory_than_training_is_left_out() -> None:
    """8B on T8: 5.5 GiB of weights without gradients; a pack of 512 tokens needs less than 1 GiB."""
    lora = sized(**{"lora": {"rank": 8, "targetModules": ["attention_qkv"]}, "parallelism.tensor": 8})
    small = Layout(8, 1, 1, 1, sequence=True, recomputation="full", pack_tokens=512)
    verdict = too_large(lora, LLAMA_8B, small)
    assert verdict is not None
    assert verdict.verified is None
    assert str(verdict).startswith("not verified: the comparison takes 5.5 GiB of rank 0's GPU, and training only ")
    whole = Layout(2, 1, 1, 4, sequence=True, recomputation="none", pack_tokens=8192)
    assert too_large(sized(**{"parallelism.tensor": 2}), LLAMA_8B, whole) is None


@pytest.mark.slow
def test_a_wrongly_cut_weight_is_found_on_every_rank(tmp_path: Path) -> None:
    folder = save_folder(reference_model("llama", dtype=torch.bfloat16), tmp_path / "model")
    run_ranks(2, check, str(folder), str(tmp_path))
    one, other = ((tmp_path / str(rank)).read_text().splitlines() for rank in range(2))
    assert one == other
    assert [line.partition(":")[0] for line in one] == ["verified", "verified", "wrong"], one
    assert "differ" in one[2]


@pytest.mark.slow
def test_a_run_whose_layout_is_wrong_ends_on_every_rank_before_its_first_step(tmp_path: Path) -> None:
    spec = merged(make(tmp_path), {"parallelism": {"tensor": 2}})
    run_ranks(2, run_wrongly, spec, str(tmp_path / "run"), str(tmp_path))
    (outcome, words), other = ((tmp_path / str(rank)).read_text().split("\n", 1) for rank in range(2))
    assert [outcome, words] == other
    assert outcome == "WrongLayout"
    assert "use another spec.parallelism" in words
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
