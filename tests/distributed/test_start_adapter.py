"""A start model that is a folder with a LoRA adapter trains as the folder that PEFT merges the two into."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_testing.adapters import logits, write_adapter
from dpo_testing.runs import Finished, merged, run_here, run_processes
from dpo_testing.training_world import make
from dpo_testing.trajectories import differences

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("start-adapter")]

LORA = {"rank": 2, "alpha": 3, "rslora": True, "targetModules": ["attention"]}


@pytest.fixture(scope="module", params=[False, True], ids=["alpha/r", "alpha/√r"])
def specs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ...]:
    """The spec with the adapter, and the same that starts from PEFT's merged folder."""
    world = tmp_path_factory.mktemp("adapter")
    spec = make(world, pairs=9, validation=2)
    sft = write_adapter(world / "model", world / "sft", use_rslora=request.param)
    spec = merged(spec, {"training": {"maxSteps": 3}, "checkpoint": {"everySteps": 2}})
    return (
        merged(spec, {"model": {"adapter": {"uri": str(sft)}}}),
        merged(spec, {"model": {"huggingFace": {"uri": str(sft / "merged")}}}),
    )


def test_all_weights_of_the_sum_are_trained(specs: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    ours, plain = (run_here(spec, tmp_path / str(index)) for index, spec in enumerate(specs))
    assert differences(ours, plain) == []
    assert ours.series("train/preference_loss")[0] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_new_adapter_on_top_leaves_as_one_adapter_of_the_base(
    processes: int, specs: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    ours, plain = (merged(spec, {"lora": LORA, "training": {"learningRate": 1e-2}}) for spec in specs)
    expected = run_here(plain, tmp_path / "plain")
    if processes == 1:
        found = run_here(ours, tmp_path / "ours")
    else:
        divided = merged(ours, {"parallelism": {"tensor": 2}})
        found = run_processes(divided, tmp_path / "ours", processes=2, scratch=tmp_path / "scratch")
    assert differences(found, expected) == []
    base = Path(ours["model"]["huggingFace"]["uri"])
    moved = (logits(found.folder / "model") - logits(Path(plain["model"]["huggingFace"]["uri"]))).abs().max()
    assert moved > 1e-3, "the new adapter has learnt something"
    torch.testing.assert_close(
        logits(base, found.folder / "model" / "adapter"), logits(found.folder / "model"), rtol=1e-5, atol=1e-5
    )


def test_the_masters_of_bf16_start_from_the_exact_sum(specs: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    """At a rate of almost 0 the result is the sum in fp32, which bf16 would round."""
    settings = {"training": {"precision": "bf16", "learningRate": 1e-30, "weightDecay": 0.0, "maxSteps": 1}}
    found: Finished = run_here(merged(specs[0], {**settings, "output": {"dtype": "fp32"}}), tmp_path / "bf16")
    for name, tensor in run_here(merged(specs[1], settings), tmp_path / "plain").weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-6, atol=1e-6)
