"""bf16 training keeps fp32 masters, which at a small learning rate move as an fp32 run's weights do; bf16 ones do not.

A step of Adam at 9e-7 is far below half a unit in the last place of a bf16 weight of 0.1 (2.4e-4), so weights that are
updated in bf16 do not change: NeMo's fine-tuning learning rate would train nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_testing.runs import merged, run_here
from dpo_testing.training_world import make
from dpo_trainer.engine import Engine
from dpo_trainer.run import Run
from dpo_trainer.training import Training

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("masters")]

STEPS, RATE = 20, 9e-7
COSINE, SIZE = 0.99, 0.02
"""How well the masters' displacement must agree with the fp32 run's: cosine of the angle, relative difference of norms.

bf16 has 8 bits: each product of the forward and backward passes carries about 2^-9 = 0.2 %, some tens of products deep.
Adam divides by the gradient's own size, so this reaches the displacement undamped, and turns the sign of the few
weights whose gradient is as small as the noise: an angle of a few hundredths (measured: cosine 0.9996, norms equal to
2e-4), bounded here with a factor of five. Weights that do not move have the cosine 0, as unrelated ones have to 0.01.
"""

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    """A start model whose every weight bf16 can hold, so that both precisions start at the same point."""
    spec = make(world, pairs=13)
    path = world / "model" / "model.safetensors"
    rounded = {name: value.bfloat16().float() for name, value in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})
    training = {
        "maxSteps": STEPS,
        "learningRate": RATE,
        "schedule": {"warmupSteps": 0, "minLearningRate": RATE},
        "weightDecay": 0.0,
        "validationInterval": 100,
    }
    return merged(spec, {"training": training})


def masters_of(engine: Engine) -> Weights:
    """The fp32 weights that Adam updates, by name; a single process holds all of each."""
    found = {}
    for name, parameter in engine.model.named_parameters():
        main = getattr(parameter, "main_param", None)
        found[name] = (parameter if main is None else main).detach().float().reshape(parameter.shape).clone()
    return found


def trained(spec: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Weights, Weights, Weights]:
    """(where the masters start, where they end, the compute weights at the end)."""
    start: list[Weights] = []
    end: list[Weights] = []
    prepare = Engine.prepare_training

    def prepared(engine: Engine) -> None:
        prepare(engine)
        start.append(masters_of(engine))

    def look(run: Run) -> None:
        assert run.training is not None
        end.append(masters_of(run.training.engine))
        end.append({name: value.detach().clone() for name, value in run.training.engine.model.named_parameters()})

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "prepare_training", prepared)
        rates = run_here(spec, folder, look).series("train/lr")
    assert rates == [RATE] * STEPS
    return start[0], end[0], end[1]


def displacement(start: Weights, end: Weights) -> Tensor:
    return torch.cat([(end[name] - start[name]).double().flatten() for name in sorted(start)])


def follows(moved: Tensor, expected: Tensor) -> bool:
    """The property under test."""
    if not moved.norm() > 0:
        return False
    cosine = float(moved @ expected / (moved.norm() * expected.norm()))
    return cosine > COSINE and abs(float(moved.norm() / expected.norm()) - 1) < SIZE


@pytest.fixture(scope="module")
def expected(spec: dict[str, Any], world: Path) -> Tensor:
    """How an fp32 run moves."""
    with pytest.MonkeyPatch.context() as patch:
        start, end, _ = trained(spec, world / "fp32", patch)
    moved = displacement(start, end)
    # Adam moves each weight by at most about the rate a step; most weights move most of that way.
    assert RATE * STEPS * 0.2 < float(moved.abs().mean()) < RATE * STEPS * 1.5
    return moved


@pytest.mark.parametrize(
    "distributed",
    [True, pytest.param(False, marks=pytest.mark.nightly)],
    ids=["distributed optimizer", "plain optimizer"],
)
def test_bf16_masters_follow_an_fp32_run(
    distributed: bool, spec: dict[str, Any], world: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = {"training": {"precision": "bf16"}, "parallelism": {"distributedOptimizer": distributed}}
    start, end, compute = trained(merged(spec, bf16), world / f"bf16 {distributed}", monkeypatch)
    assert {value.dtype for value in compute.values()} == {torch.bfloat16}
    assert [name for name, value in compute.items() if not value.equal(end[name].bfloat16())] == []
    assert follows(displacement(start, end), expected)


def test_without_masters_it_fails(
    spec: dict[str, Any], world: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients, the same Adam, but on the bf16 weights themselves: they stay where they are."""
    monkeypatch.setattr(Engine, "_update", _update_without_masters)
    monkeypatch.setattr(Training, "checkpoint", lambda _: None)  # there is no Megatron-Core optimizer to save
    start, _, compute = trained(merged(spec, {"training": {"precision": "bf16"}}), world / "without", monkeypatch)
    moved = displacement(start, {name: value.float() for name, value in compute.items()})
    assert not follows(moved, expected)
    assert float((moved != 0).double().mean()) < 0.2


def _update_without_masters(engine: Engine, _norm: float, rate: float) -> None:
    parameters = list(engine.model.parameters())
    own: Any = engine.__dict__.setdefault(
        "_without_masters", torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    )
    for parameter in parameters:
        parameter.grad = parameter.main_grad.to(parameter.dtype)  # type: ignore[attr-defined]
    own.step()
    for parameter in parameters:
        parameter.grad = None


@pytest.mark.parametrize("harm", [lambda moved: -moved, lambda moved: 0.5 * moved, torch.zeros_like])
def test_the_comparison_notices(harm: Callable[[Tensor], Tensor], expected: Tensor) -> None:
    assert follows(expected, expected)
    assert not follows(harm(expected), expected)
