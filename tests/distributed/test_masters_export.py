"""A bf16 run does not export bf16: the result is the fp32 masters, or the start model's own bytes."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_testing.runs import Finished, merged, run_here, run_processes
from dpo_testing.training_world import make
from dpo_trainer.engine import Engine
from dpo_trainer.formats.huggingface import stage_slots
from dpo_trainer.formats.layout import dissolve
from dpo_trainer.run import Run
from dpo_trainer.training import Training

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("masters")]

LORA = {"lora": {"rank": 4, "alpha": 8, "targetModules": ["all"]}, "training": {"learningRate": 1e-2}}

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    """bf16 training of an fp32 model (one matrix of it fp16) that bf16 cannot hold, minus zeros among its weights."""
    spec = make(world, pairs=13)
    path = world / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"].half()
    weights["model.layers.1.mlp.down_proj.weight"][0, :5] = -0.0
    save_file(weights, path, metadata={"format": "pt"})
    assert not all(value.equal(value.bfloat16().to(value.dtype)) for value in weights.values())
    return merged(spec, {"training": {"precision": "bf16", "maxSteps": 3, "validationInterval": 100}})


def start_of(world: Path) -> Weights:
    return dict(load_file(world / "model" / "model.safetensors"))


def bits(weights: Weights) -> dict[str, bytes]:
    return {name: bytes(value.contiguous().view(torch.uint8).numpy().tobytes()) for name, value in weights.items()}


def apart(engine: Engine, value: Callable[[Tensor], Tensor]) -> Weights:
    """Hugging Face's tensors of a value that each parameter has. One process alone."""
    model = engine.model
    found: Weights = {}
    for slot in stage_slots(model):
        parameter = model.get_parameter(slot.parameter)
        whole = value(parameter).detach().reshape(parameter.shape)
        found.update(zip(slot.sources, dissolve(slot, whole, model.dpo_config), strict=True))
    return found


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_the_result_is_the_masters_values(distributed: bool, spec: dict[str, Any], world: Path) -> None:
    masters: Weights = {}
    computed: Weights = {}

    def look(run: Run) -> None:
        assert run.training is not None
        engine = run.training.engine
        masters.update(apart(engine, operator.attrgetter("main_param")))
        computed.update(apart(engine, lambda parameter: parameter))

    mine = merged(spec, {"parallelism": {"distributedOptimizer": distributed}, "output": {"dtype": "fp32"}})
    result = run_here(mine, world / f"full {distributed}", look).weights
    assert {value.dtype for value in masters.values()} == {torch.float32}
    assert {value.dtype for value in computed.values()} == {torch.bfloat16}
    assert bits(result) == bits(masters)
    for name, value in result.items():
        assert not value.equal(computed[name].float()), name
        assert value.bfloat16().equal(computed[name]), name


@pytest.mark.parametrize("change", [{}, LORA], ids=["full", "LoRA"])
def test_where_nothing_is_learnt_the_start_model_comes_back(
    change: dict[str, Any], spec: dict[str, Any], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B is zero until the first update, and masters begin at the file's values: each tensor's bytes and type."""
    monkeypatch.setattr(Engine, "_update", lambda *_: None)
    monkeypatch.setattr(Training, "checkpoint", lambda _: None)  # an Adam that never stepped cannot be saved
    result = run_here(merged(spec, change), world / f"nothing learnt {len(change)}").weights
    assert bits(result) == bits(start_of(world))


def test_an_adapter_is_merged_into_the_start_models_own_weights(spec: dict[str, Any], world: Path) -> None:
    """W + s · B A from the PEFT folder's fp32 matrices; what has no adapter keeps its bytes."""
    finished = run_here(merged(spec, LORA), world / "LoRA")
    start, result = start_of(world), finished.weights
    adapter = load_file(finished.folder / "model" / "adapter" / "adapter_model.safetensors")
    adapted = set()
    for name in adapter:
        if not name.endswith("lora_A.weight"):
            continue
        weight = name.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight"
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        assert not b.equal(b.bfloat16().float()), "the adapter was rounded to bf16"
        expected = start[weight].float() + 2.0 * (b @ a)
        gap = (result[weight].float() - expected).abs().max().item()
        assert gap <= (2**-11 if start[weight].dtype == torch.float16 else 1e-6), weight
        adapted.add(weight)
    assert len(adapted) == 14
    others = start.keys() - adapted
    assert {name: value for name, value in bits(result).items() if name in others} == bits(
        {name: start[name] for name in others}
    )


@pytest.mark.parametrize("change", [{}, LORA], ids=["full", "LoRA"])
def test_two_processes_and_a_resumed_one_leave_the_same_bytes(
    change: dict[str, Any], spec: dict[str, Any], world: Path
) -> None:
    """The shards of two ranks, and then the same masters from the last checkpoint in one process."""
    folder = world / f"two {len(change)}"
    mine = merged(spec, {**change, "training": {**change.get("training", {}), "maxSteps": 2}})
    two = run_processes(merged(spec, mine), folder, processes=2, scratch=world / f"two {len(change)} scratch")
    before = everything(two)
    (folder / "export.json").unlink()
    for path in (folder / "model").glob("**/*.safetensors"):
        path.unlink()
    again = everything(run_here(merged(spec, mine), folder))
    assert again == before
    assert bits(two.weights) != bits(start_of(world))


def everything(run: Finished) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted((run.folder / "model").glob("**/*.safetensors")):
        found |= {f"{path.name} {name}": value for name, value in bits(load_file(path)).items()}
    return found
