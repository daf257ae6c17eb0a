"""The layout on GPUs, as `dpo validate`, `dpo submit` and `dpo run` show it: choice, reasons, runners-up, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_api.sizing import Choice, choose
from dpo_cli import machine
from dpo_cli.validate import host_memory
from dpo_testing import sizes
from dpo_testing.cli import Dpo, World
from dpo_testing.sizes import gpus, sized

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LLAMA_70B = {
    **LLAMA_8B,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "hidden_size": 8192,
    "intermediate_size": 28672,
}


@pytest.fixture
def large(world: World) -> World:
    """A world whose model is Llama 3 8B by its config.json; its weights are not read."""
    (world.folder / "model" / "config.json").write_text(json.dumps(LLAMA_8B))
    world.spec["resources"] = {"nodes": 1, "gpusPerNode": 8, "gpuProduct": "H200"}
    world.spec["lora"] = {"rank": 32}
    world.spec["data"]["maxLength"] = 2048
    world.spec["training"]["globalBatchSize"] = 64
    return world


def test_the_choice_is_shown_with_its_reasons(large: World, dpo: Dpo) -> None:
    said = dpo("validate", large.write())
    assert said.code == 0, said.all
    assert "  layout      tensor 1, pipeline 1, data 8, no recomputation, packs of " in said.out
    assert "on 1 node of 8 H200\n" in said.out
    assert "this one has the shortest predicted step, " in said.out
    assert "GiB: weights 15.0 GiB, " in said.out
    assert "a layout may take 125.1 GiB of a GPU's 139.0 GiB (10 % is kept free)" in said.out


def test_what_is_set_is_marked(large: World, dpo: Dpo) -> None:
    said = dpo("validate", large.write(), "--set", "training.packing.maxTokens=5000", "--set", "parallelism.tensor=1")
    assert (
        "  layout      tensor 1 (set), pipeline 1, data 8, no recomputation, packs of 5,000 tokens (set)\n" in said.out
    )


def test_json_has_the_choice_and_the_effective_sizes(large: World, dpo: Dpo) -> None:
    (found,) = json.loads(dpo("validate", "-o", "json", large.write()).out)
    layout = found["layout"]
    assert layout["sizes"]["tensor"] == 1
    assert layout["hardware"] == {"nodes": 1, "gpusPerNode": 8, "gpuProduct": "H200", "assumed": False}
    assert layout["memoryBytes"]["total"] == sum(v for k, v in layout["memoryBytes"].items() if k != "total")
    assert layout["memoryBytes"]["total"] <= layout["limitBytes"]
    assert "parallelism.tensor" in layout["chosen"]
    assert found["effective"]["training"]["packing"]["maxTokens"] == layout["sizes"]["packTokens"]
    assert found["plan"]["packMaxTokens"] == layout["sizes"]["packTokens"]


def test_what_does_not_fit_is_refused_with_what_would(large: World, dpo: Dpo) -> None:
    large.spec["resources"]["gpuProduct"] = "A10G"
    large.spec["resources"]["gpusPerNode"] = 1
    del large.spec["lora"]
    said = dpo("validate", large.write())
    assert said.code == 2
    assert "  error    spec.resources: the model does not fit 1 node of 1 A10G: " in said.out


def test_an_unknown_gpu_refuses_nothing(large: World, dpo: Dpo) -> None:
    del large.spec["resources"]["gpuProduct"]
    said = dpo("validate", large.write())
    assert said.code == 0
    assert (
        "on 1 node of 8 H100-80GB, assumed: no GPU is named: set resources.gpuProduct, or a node selector" in said.out
    )
    del large.spec["lora"]
    large.spec["resources"]["gpusPerNode"] = 1
    said = dpo("validate", large.write())
    assert said.code == 0
    assert "  warning  spec.resources: the model does not fit 1 node of 1 H100-80GB: " in said.out


def test_nothing_is_chosen_on_cpu(large: World, dpo: Dpo) -> None:
    large.spec["resources"] = {"gpusPerNode": 0}
    said = dpo("validate", large.write())
    assert said.code == 0
    assert "  layout" not in said.out


def test_an_unknown_product_is_an_error_that_names_the_known_ones(large: World, dpo: Dpo) -> None:
    said = dpo("validate", large.write(), "--set", "resources.gpuProduct=H300")
    assert said.code == 2
    assert "spec.resources.gpuProduct: " in said.out
    assert "H200" in said.out


@pytest.mark.parametrize(
    ("listing", "count", "name"),
    [
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n", 2, "NVIDIA H200"),
        (
            "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n  MIG 3g.40gb Device 0: (UUID: MIG-1)\n",
            1,
            "NVIDIA H100 80GB HBM3",
        ),
        ("No devices found.\n", 0, None),
    ],
)
def test_the_gpu_is_named_by_its_driver(
    listing: str, count: int, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{listing}'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus({"PATH": f"{tmp_path}:/bin:/usr/bin"}) == (count, name)


def arguments(world: World, config: dict[str, Any]) -> list[str]:
    """Return the options that point an example at this world's files."""
    (world.folder / "model" / "config.json").write_text(json.dumps(config))
    changes = {
        "model.huggingFace.uri": str(world.folder / "model"),
        "data.train": f"[{{uri: {world.folder / 'data' / 'train.jsonl'}}}]",
        "data.validation": "[]",
        "checkpoint.uri": str(world.folder / "run"),
    }
    return [word for path, value in changes.items() for word in ("--set", f"{path}={value}")]


MODELS = {"llama3-8b-full": LLAMA_8B, "llama3-70b-lora": LLAMA_70B, "llama3-70b-full": LLAMA_70B}


@pytest.mark.parametrize("name", MODELS)
def test_an_example_predicts_what_the_command_shows(name: str, world: World, dpo: Dpo) -> None:
    example = EXAMPLES / f"{name}.yaml"
    said = dpo("validate", str(example), *arguments(world, MODELS[name]))
    assert said.code == 0, said.all
    predicted = [line.removeprefix("#   ") for line in example.read_text().splitlines() if line.startswith("#   ")]
    assert len(predicted) >= 5
    assert "\n".join(f"  {line}" for line in predicted) in said.out


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "llama3-70b-full",
            ["resources.nodes=1"],
            ["4 nodes of 8 H100-80GB would fit (tensor ", "and lora would fit"],
        ),
        ("llama3-70b-full", ["resources.nodes=1", "lora={rank: 8}"], []),
        (
            "llama3-70b-lora",
            ["resources.gpuProduct=L4", "resources.gpusPerNode=4"],
            ["; 1 node of 8 L4 would fit (tensor "],
        ),
        ("llama3-8b-full", ["parallelism={tensor: 1, pipeline: 1}"], []),
        (
            "llama3-8b-full",
            ["parallelism={tensor: 1, pipeline: 1}", "training.activationRecomputation=none"],
            ["; leave parallelism.tensor and parallelism.pipeline and training.activationRecomputation out: tensor "],
        ),
    ],
)
def test_an_example_that_no_longer_fits(
    name: str, settings: list[str], words: list[str], world: World, dpo: Dpo
) -> None:
    more = [word for text in settings for word in ("--set", text)]
    said = dpo("validate", str(EXAMPLES / f"{name}.yaml"), *arguments(world, MODELS[name]), *more)
    assert said.code == (2 if words else 0), said.all
    assert all(word in said.out for word in words), said.out


def test_an_asynchronous_checkpoint_needs_host_memory() -> None:
    eight = gpus("H200")
    settings = {"checkpoint.async": True, "parallelism.tensor": 1, "parallelism.pipeline": 1}
    found = choose(sizes.LLAMA_8B, sized(**settings), eight)
    assert isinstance(found, Choice)
    for memory, refused in (("89Gi", True), ("96G", True), ("90Gi", False), (None, False)):  # 12 x 8.03e9 bytes
        spec = sized(**settings, **({} if memory is None else {"resources.memory": memory}))
        said = [str(finding) for finding in host_memory(spec, sizes.LLAMA_8B, found)]
        assert bool(said) == refused, memory
    small = sized(**settings, **{"resources.memory": "1Gi"})
    (said_of_it,) = host_memory(small, sizes.LLAMA_8B, found)
    assert str(said_of_it).startswith("spec.resources.memory: 1Gi is less than an asynchronous checkpoint copies")
    without = sized(**{**settings, "checkpoint.async": False, "resources.memory": "1Gi"})
    assert list(host_memory(without, sizes.LLAMA_8B, found)) == []
