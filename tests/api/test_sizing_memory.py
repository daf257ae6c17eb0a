"""The memory model: rows computed by hand from the architecture, term by term."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import pytest

from dpo_api.models import ModelFacts
from dpo_api.running import GpuProduct
from dpo_api.sizing import (
    PRODUCTS,
    Layout,
    checkpoint_bytes,
    comparison_bytes,
    memory_of,
    memory_of_stage,
    parameters,
    product_named,
    product_of,
    stages,
)
from dpo_testing.sizes import LLAMA_8B, LLAMA_70B, QWEN_05B, sized

DENSE = {"sequence": False, "recomputation": "none", "context": 1, "pipeline": 1, "pack_tokens": 8192}


def layout(tensor: int, data: int, **sizes: Any) -> Layout:
    return Layout(tensor=tensor, data=data, **{**DENSE, "sequence": tensor > 1, **sizes})


@pytest.mark.parametrize(
    ("model", "count"),
    [
        # 32 x (4096 x 6144 + 4096 x 4096 + 3 x 4096 x 14336 + 2 x 4096) + 2 x 128256 x 4096 + 4096
        (LLAMA_8B, 8_030_261_248),
        # 80 x (8192 x 10240 + 8192 x 8192 + 3 x 8192 x 28672 + 2 x 8192) + 2 x 128256 x 8192 + 8192
        (LLAMA_70B, 70_553_706_496),
        # 24 x (897 x 1152 + 896 x 896 + 3 x 896 x 4864 + 2 x 896) + 151936 x 896 + 896, tied and with biases of q/k/v
        (QWEN_05B, 494_032_768),
    ],
    ids=["Llama 3 8B", "Llama 3 70B", "Qwen2.5 0.5B"],
)
def test_parameters_are_those_of_the_published_models(model: ModelFacts, count: int) -> None:
    assert parameters(model) == count


@pytest.mark.parametrize(
    ("changes", "count", "bytes_each"),
    [
        # Two layers of 218,112,000, embedding and LM head of 525,336,576 each, the last norm; weights and gradients.
        ({}, 2 * 218_112_000 + 2 * 525_336_576 + 4096, 8),
        ({"parallelism.pipeline": 4}, 4 * 218_112_000 + 2 * 525_336_576 + 4096, 8),
        ({"lora": {"rank": 32, "targetModules": ["attention_qkv"]}}, 2 * 218_112_000 + 2 * 525_336_576 + 4096, 4),
    ],
)
def test_the_comparison_of_a_layout(changes: dict[str, Any], count: int, bytes_each: int) -> None:
    assert comparison_bytes(LLAMA_8B, sized(**changes)) == count * bytes_each


def test_a_whole_8b_on_eight_gpus() -> None:
    found = memory_of(LLAMA_8B, sized(), layout(1, 8))
    assert asdict(found) == {
        "weights": 2 * 8_030_261_248,
        "gradients": 4 * 8_030_261_248,
        "optimizer": 12 * 1_003_782_656,  # an eighth of them
        "activations": 32 * (16 * 4096 + 6 * 1024 + 6 * 14336) * 8192,
        "adapter_activations": 0,
        "logits": 2 * 8192 * 128_256 + 33_554_432,  # all rows are kept, and 32 MiB of fp32
    }
    assert found.total == 103700920320


def test_recomputation_of_an_8b() -> None:
    selective = memory_of(LLAMA_8B, sized(), layout(1, 8, recomputation="selective"))
    assert selective.activations == (32 * (16 * 4096 + 6 * 1024) + 6 * 14336) * 8192 == 19495124992
    full = memory_of(LLAMA_8B, sized(), layout(1, 8, recomputation="full"))
    assert full.activations == (32 * 2 * 4096 + 16 * 4096 + 6 * 1024 + 6 * 14336) * 8192 == 3439329280


def test_tensor_parallelism_divides_by_tokens_only_with_sequence() -> None:
    with_sequence = memory_of(LLAMA_8B, sized(), layout(2, 4))
    assert with_sequence.activations == 32 * (16 * 4096 + 6 * 1024 + 6 * 14336) // 2 * 8192
    # 10h of the 16h are norms, residuals and a temporary, which every rank then holds as a whole.
    without = memory_of(LLAMA_8B, sized(), layout(2, 4, sequence=False))
    assert without.activations == 32 * (10 * 4096 + (6 * 4096 + 6 * 1024 + 6 * 14336) // 2) * 8192
    # Matrices are halved, the 65 norms are not.
    halves = (8_030_261_248 - 65 * 4096) // 2 + 65 * 4096
    assert with_sequence.weights == 2 * halves


def test_context_parallelism_divides_tokens_and_optimizer_but_not_keys() -> None:
    """Two ranks with 4,096 of a pack's 8,192 tokens each, and 2 x 4.5 rows of keys and values, 1024 wide, for each."""
    found = memory_of(LLAMA_8B, sized(), layout(1, 4, context=2))
    assert found.activations == 32 * (16 * 4096 + 18 * 1024 + 6 * 14336) * 4096
    assert found.optimizer == 12 * 1_003_782_656  # an eighth: 4 x 2 ranks
    assert found.weights == 2 * 8_030_261_248
    assert checkpoint_bytes(LLAMA_8B, sized(), layout(1, 4, context=2)) == 12 * 1_003_782_656


def test_a_whole_70b_in_four_stages() -> None:
    sizes = layout(8, 1, pipeline=4, recomputation="selective", pack_tokens=4096)
    first, middle, _, last = (memory_of_stage(LLAMA_70B, sized(), sizes, stage) for stage in stages(80, 4))
    # 20 of 80 layers: 106,954,752 is an eighth of a layer's matrices; norms are whole.
    layers = 20 * (106_954_752 + 2 * 8192)
    table = 128_256 * 8192 // 8
    assert first.weights == 2 * (layers + table)
    assert middle.weights == 2 * layers
    assert last.weights == 2 * (layers + table + 8192)
    assert first.optimizer == 12 * (layers + table)
    # The first stage keeps four packs of 20 layers, the second three, the last one.
    token = (16 * 8192 + 6 * 1024) // 8
    mlp = 6 * 28672 // 8
    assert first.activations == (80 * token + mlp) * 4096
    assert middle.activations == (60 * token + mlp) * 4096
    assert last.activations == (20 * token + mlp) * 4096
    assert (first.logits, last.logits) == (0, 2 * 4096 * 16_032 + 33_554_432)
    assert memory_of(LLAMA_70B, sized(), sizes) == first


def test_an_adapter_on_a_70b() -> None:
    spec = sized(lora={"rank": 32, "targetModules": ["attention_qkv"]})
    found = memory_of(LLAMA_70B, spec, layout(8, 1, recomputation="full"))
    # A: 32 x 8192, B: 10240 x 32, in 80 layers, an eighth on each rank.
    adapter = 80 * 32 * (8192 + 10240) // 8
    base = 80 * (106_954_752 + 2 * 8192) + 2 * 128_256 * 8192 // 8 + 8192
    assert found.weights == 2 * (base + adapter)
    assert found.gradients == 4 * adapter
    assert found.optimizer == 12 * adapter
    assert found.logits == 2 * 8192 * 16_032 + 33_554_432  # one chunk of 256 MiB or less
    assert found.activations == (80 * 2 * 8192 + 16 * 8192 + 6 * 1024 + 6 * 28672) // 8 * 8192
    # One layer's, because the layer is recomputed: the inner vector and the gathered input, in bf16.
    assert found.adapter_activations == 2 * (32 + 8192) * 8192
    assert checkpoint_bytes(LLAMA_70B, spec, layout(8, 1)) == 12 * adapter


def test_an_adapter_that_is_continued_on_a_70b() -> None:
    """Query, key and value have an A each, and so have gate and up; B is widened to all of them."""
    changes = {"rank": 16, "targetModules": ["all"], "continueAdapter": True}
    spec = sized(lora=changes, **{"model.adapter": {"uri": "/sft"}})
    found = memory_of(LLAMA_70B, spec, layout(8, 1, recomputation="full"))
    adapter = 80 * 16 * (3 * 8192 + 10240 + 2 * 8192 + 8192 + 2 * 28672 + 2 * 8192 + 28672) // 8
    assert found.optimizer == 12 * adapter
    inner, gathered = 16 * (3 + 1 + 2 + 1), 2 * 8192
    wide = 16 * (3 * 10240 + 2 * 2 * 28672) // 8
    assert found.adapter_activations == 2 * ((inner + gathered) * 8192 + wide)


def test_a_head_that_does_not_fit_into_its_budget() -> None:
    """Of 8,371 rows of 256,512 bytes that fit, 1,046 are a chunk's."""
    found = memory_of(LLAMA_8B, sized(), layout(1, 8, pack_tokens=16_384))
    assert 2**31 // 256_512 == 8371
    rest = 16_384 - (8371 - 1046)
    chunk = -(-rest // 9)
    assert found.logits == 256_512 * (8371 - 1046 + chunk) + 33_554_432 < 2**31 + 2**25
    # A frozen head keeps nothing: a chunk is an eighth of the budget at most.
    frozen = memory_of(LLAMA_8B, sized(lora={"rank": 8, "targetModules": ["attention_qkv"]}), layout(1, 8))
    assert frozen.logits == 256_512 * 1024 + 33_554_432


def test_fp32_has_no_second_masters() -> None:
    found = memory_of(LLAMA_8B, sized(**{"training.precision": "fp32"}), layout(1, 8))
    assert (found.weights, found.gradients, found.optimizer) == (
        4 * 8_030_261_248,
        4 * 8_030_261_248,
        8 * 1_003_782_656,
    )
    assert found.activations == 2 * 32 * (16 * 4096 + 6 * 1024 + 6 * 14336) * 8192


def test_without_the_distributed_optimizer_each_rank_holds_all_of_its_state() -> None:
    found = memory_of(LLAMA_8B, sized(**{"parallelism.distributedOptimizer": False}), layout(1, 8))
    assert found.optimizer == 12 * 8_030_261_248


def test_tied_embeddings_are_held_twice_only_by_two_stages() -> None:
    whole = memory_of_stage(QWEN_05B, sized(), layout(1, 1), stages(24, 1)[0])
    assert whole.weights == 2 * 494_032_768
    first, last = (memory_of_stage(QWEN_05B, sized(), layout(1, 1, pipeline=2), stage) for stage in stages(24, 2))
    assert first.weights + last.weights == 2 * (494_032_768 + 151_936 * 896)


def test_a_checkpoint_in_flight_copies_masters_and_moments() -> None:
    assert checkpoint_bytes(LLAMA_8B, sized(), layout(1, 8)) == 12 * 1_003_782_656


def test_a_pack_of_one_pair_is_as_large_as_its_pair() -> None:
    one = layout(1, 8, pack_tokens=4096)
    assert memory_of(LLAMA_8B, sized(), one).activations * 2 == memory_of(LLAMA_8B, sized(), layout(1, 8)).activations


@pytest.mark.parametrize(("layers", "pipeline", "counts"), [(32, 4, [8, 8, 8, 8]), (4, 3, [2, 1, 1]), (5, 2, [3, 2])])
def test_stages_hold_whole_layers_and_the_last_one_is_never_longer(
    layers: int, pipeline: int, counts: list[int]
) -> None:
    found = stages(layers, pipeline)
    assert [len(stage.layers) for stage in found] == counts
    assert [layer for stage in found for layer in stage.layers] == list(range(layers))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA-H100-80GB-HBM3", "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("nvidia-h100-80gb", "H100-80GB"),
        ("nvidia-h100-mega-80gb", "H100-80GB"),
        ("h100", "H100-80GB"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("nvidia-h200-141gb", "H200"),
        ("NVIDIA-A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA-A100-SXM4-40GB", "A100-40GB"),
        ("nvidia-tesla-a100", "A100-40GB"),
        ("nvidia-a100-80gb", "A100-80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA-L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_drivers_and_labels_name_products(text: str, name: str | None) -> None:
    found = product_named(text)
    assert (found.name if found else None) == name


def test_the_field_has_the_names_of_the_table() -> None:
    assert sorted(get_args(GpuProduct)) == sorted(product.name for product in PRODUCTS)
    for product in PRODUCTS:
        assert product_named(product.name) == product


def test_the_field_wins_over_node_selectors() -> None:
    selector = {"podTemplate.nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB", "zone": "h200"}}
    by_selector, by_field = (
        product_of(sized(**selector)),
        product_of(sized(**selector, **{"resources.gpuProduct": "L4"})),
    )
    assert by_selector is not None
    assert by_selector.name == "A100-80GB"
    assert by_field is not None
    assert by_field.name == "L4"
    assert product_of(sized()) is None


def test_fp8_keeps_the_matrices_of_the_layers_and_their_transposes_once_more() -> None:
    """Of 8,030,261,248 parameters of an 8B, 65 norms and two tables are in no matrix of a layer."""
    eight = sized(**{"transformerEngine.fp8": "hybrid"})
    plain, found = memory_of(LLAMA_8B, sized(), layout(1, 8)), memory_of(LLAMA_8B, eight, layout(1, 8))
    assert found.weights - plain.weights == 2 * (8_030_261_248 - 65 * 4096 - 2 * 128_256 * 4096)
    assert found.total - plain.total == found.weights - plain.weights
