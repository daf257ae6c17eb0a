"""The choice of a layout: what is set is kept, what fits is found, what does not is refused with what would."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_api.manifest import load_manifest
from dpo_api.models import ModelFacts
from dpo_api.sizing import (
    Choice,
    Hardware,
    Layout,
    Refusal,
    candidates,
    choose,
    hardware_of,
    memory_limit,
    memory_of,
    set_sizes,
    stages,
    step_seconds,
    with_layout,
    without_sizes,
)
from dpo_api.sizing.speed import context_seconds
from dpo_api.sizing.texts import layout_text, sizes_text
from dpo_api.spec import DPOJobSpec
from dpo_testing.manifests import job
from dpo_testing.sizes import LLAMA_1B, LLAMA_8B, LLAMA_70B, LLAMA_405B, MISTRAL_7B, gpus, sized

H100, H200 = gpus("H100-80GB"), gpus("H200")
LORA = {"lora": {"rank": 32, "targetModules": ["attention_qkv"]}}


def chosen(model: ModelFacts, spec: DPOJobSpec, hardware: Hardware) -> Choice:
    found = choose(model, spec, hardware)
    assert isinstance(found, Choice), found
    return found


def refused(model: ModelFacts, spec: DPOJobSpec, hardware: Hardware) -> Refusal:
    found = choose(model, spec, hardware)
    assert isinstance(found, Refusal), found
    return found


def sizes(layout: Layout) -> tuple[int, int, int]:
    return layout.tensor, layout.pipeline, layout.data


def test_a_model_that_fits_is_not_divided() -> None:
    assert sizes(chosen(LLAMA_1B, sized(), H100).best.layout) == (1, 1, 8)
    assert sizes(chosen(LLAMA_8B, sized(**LORA), H100).best.layout) == (1, 1, 8)


def test_a_70b_is_divided_within_the_node_first() -> None:
    layout = chosen(LLAMA_70B, sized(**LORA), H100).best.layout
    assert layout.model_size == 8
    assert layout.tensor > 1
    assert layout.sequence


def test_a_whole_70b_needs_stages_over_nodes() -> None:
    four = gpus("H100-80GB", nodes=4)
    layout = chosen(LLAMA_70B, sized(**{"data.maxLength": 2048}), four).best.layout
    assert layout.tensor * layout.pipeline * layout.data == 32
    assert layout.pipeline > 1


def test_the_fastest_that_fits_is_chosen() -> None:
    spec = sized()
    found = chosen(LLAMA_8B, spec, H100)
    limit = memory_limit(H100)
    assert limit == int(79 * 2**30 * 0.9)
    every = [layout for layout in candidates(LLAMA_8B, spec, H100) if memory_of(LLAMA_8B, spec, layout).total <= limit]
    assert found.fitting == len(every)
    assert found.best.seconds == pytest.approx(
        min(step_seconds(LLAMA_8B, spec, layout, H100) for layout in every), rel=5e-3
    )


def test_runners_up_are_slower_and_need_less_memory() -> None:
    found = chosen(LLAMA_70B, sized(), gpus("H200", nodes=4))
    ranked = [found.best, *found.runners_up]
    assert len(ranked) > 1
    for before, after in itertools.pairwise(ranked):
        assert after.memory.total <= 0.95 * before.memory.total
        assert after.seconds >= 0.99 * before.seconds


SETTINGS: dict[str, Any] = {
    "parallelism.tensor": 4,
    "parallelism.pipeline": 2,
    "training.activationRecomputation": "full",
    "training.packing.maxTokens": 10_000,
}


@pytest.mark.parametrize("count", range(1, len(SETTINGS) + 1))
def test_what_is_set_is_kept(count: int) -> None:
    read = {
        "parallelism.tensor": lambda s: s.parallelism.tensor,
        "parallelism.pipeline": lambda s: s.parallelism.pipeline,
        "training.activationRecomputation": lambda s: s.training.activation_recomputation,
        "training.packing.maxTokens": lambda s: s.training.packing.max_tokens,
    }
    for fields in itertools.combinations(SETTINGS, count):
        wanted = {field: SETTINGS[field] for field in fields}
        spec = sized(**wanted, **{"data.maxLength": 2048})
        found = chosen(LLAMA_8B, spec, gpus("H200", nodes=2))
        ran = with_layout(spec, found.best.layout)
        assert {field: read[field](ran) for field in fields} == wanted
        assert len(found.chosen) == 5 - count  # sequence is never set here


def test_a_size_that_is_set_to_its_default_is_kept() -> None:
    # It would be divided otherwise.
    assert chosen(LLAMA_8B, sized(), H100).best.layout.model_size > 1
    kept = {"parallelism.tensor": 1, "parallelism.pipeline": 1, "training.activationRecomputation": "none"}
    found = choose(LLAMA_8B, sized(**kept), H100)
    assert isinstance(found, Refusal)
    assert found.field == "spec.parallelism"
    out = "leave parallelism.tensor and parallelism.pipeline and training.activationRecomputation out: tensor "
    assert out in found.message


def test_sequence_follows_tensor_unless_it_is_set() -> None:
    spec = sized(**{"parallelism.tensor": 2, "parallelism.sequence": False})
    assert not chosen(LLAMA_8B, spec, H200).best.layout.sequence
    assert chosen(LLAMA_8B, sized(**{"parallelism.tensor": 2}), H200).best.layout.sequence


def test_a_context_size_is_kept_and_the_rest_is_chosen() -> None:
    found = chosen(LLAMA_8B, sized(**{"parallelism.context": 2, "data.maxLength": 8192}), H200)
    layout = found.best.layout
    assert layout.context == 2
    assert layout.model_size * layout.data == 8
    assert " C2 " in layout.short
    assert "context 2 (set)" in layout_text(layout, found.chosen)
    assert "context 2" in sizes_text(layout)


@pytest.mark.parametrize(("context", "seconds", "rest"), [(1, 32.0, (4, "none")), (4, 29.7, (2, "none"))])
def test_the_times_of_long_texts_in_the_documentation(context: int, seconds: float, rest: tuple[int, str]) -> None:
    best = chosen(LLAMA_8B, sized(**{"parallelism.context": context, "data.maxLength": 32_768}), H200).best
    assert (best.layout.tensor, best.layout.recomputation) == rest
    assert round(best.seconds, 1) == seconds
    assert str(seconds) in (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()


def test_a_context_size_that_divides_no_number_of_processes_is_named() -> None:
    found = refused(LLAMA_8B, sized(**{"parallelism.context": 3}), H200)
    assert found.message == (
        "no layout of 8 processes divides the model; use another number of GPUs or another parallelism.context"
    )


def test_the_time_to_gather_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per layer, keys and values of the other rank's 32,768 tokens, 1024 wide, in bf16: 128 MiB; twice."""
    layout = Layout(tensor=1, pipeline=1, context=2, data=4, sequence=False, recomputation="none", pack_tokens=65_536)
    (stage,) = stages(32, 1)
    link = 0.8 * 450e9
    found = context_seconds(LLAMA_8B, sized(), layout, stage, H200, 32_768)
    assert found == pytest.approx(32 * 2 * 134_217_728 / link)
    full = replace(layout, recomputation="full")
    assert context_seconds(LLAMA_8B, sized(), full, stage, H200, 32_768) == pytest.approx(1.5 * found)
    between = gpus("H200", per_node=1, nodes=8)
    assert context_seconds(LLAMA_8B, sized(), layout, stage, between, 32_768) == pytest.approx(found * 450 / 50)
    alone = replace(layout, context=1)
    assert context_seconds(LLAMA_8B, sized(), alone, stage, H200, 65_536) == 0
    with_gathers = step_seconds(LLAMA_8B, sized(), layout, H200)
    monkeypatch.setattr("dpo_api.sizing.speed.context_seconds", lambda *_: 0.0)
    assert step_seconds(LLAMA_8B, sized(), layout, H200) < with_gathers


def test_a_chosen_size_divides_the_node_the_heads_and_the_rank() -> None:
    for layout in candidates(LLAMA_8B, sized(lora={"rank": 6}), gpus("H200", per_node=6, nodes=2)):
        assert 6 % layout.tensor == 0
        assert 32 % layout.tensor == 0
        assert layout.tensor * layout.pipeline * layout.data == 12
        assert layout.pipeline in (1, 2, 3, 4, 6, 12)


def test_fewer_groups_than_tensor_are_shared() -> None:
    one_group = ModelFacts(32, 32, 2, 4096, 14_336, 128_256, 8192, "llama")
    assert {layout.tensor for layout in candidates(one_group, sized(), H100)} == {1, 2, 4, 8}


def test_groups_are_not_shared_by_parts_of_ranks() -> None:
    # Six groups: a rank of four would hold one and a half.
    six_groups = ModelFacts(24, 24, 6, 3072, 12_288, 128_000, 8192, "llama")
    assert {layout.tensor for layout in candidates(six_groups, sized(), H100)} == {1, 2}


def test_a_micro_batch_bounds_the_pack() -> None:
    one = {layout.pack_tokens for layout in candidates(LLAMA_8B, sized(**{"training.microBatchSize": 1}), H100)}
    assert one == {8192}
    unbounded = {layout.pack_tokens for layout in candidates(LLAMA_8B, sized(), H100)}
    assert unbounded == {8192, 16_384}


def test_a_pack_of_one_pair_is_not_chosen() -> None:
    spec = sized(**{"training.packing": {"enabled": False}})
    found = chosen(LLAMA_8B, spec, H200)
    assert found.best.layout.pack_tokens == 8192
    assert "pack_tokens" not in found.chosen
    assert with_layout(spec, found.best.layout).training.packing == spec.training.packing


def test_nothing_is_chosen_on_cpu() -> None:
    assert hardware_of(sized(**{"resources.gpusPerNode": 0})) is None


def test_the_hardware_is_what_the_spec_asks_for() -> None:
    named = sized(**{"resources.nodes": 2, "podTemplate.nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H200"}})
    assert hardware_of(named) == gpus("H200", nodes=2)
    unknown = hardware_of(sized(**{"resources.processesPerNode": 4}))
    assert unknown == gpus("H100-80GB", per_node=4, known=False)


@pytest.mark.slow
def test_more_gpus_never_refuse_what_fewer_fit() -> None:
    for model, changes, product in itertools.product(
        (MISTRAL_7B, LLAMA_8B, LLAMA_70B), ({}, LORA), ("A100-40GB", "H100-80GB", "H200", "L4")
    ):
        spec = sized(**changes)
        fits = [
            isinstance(choose(model, spec, gpus(product, per_node, nodes)), Choice)
            for per_node, nodes in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (8, 8))
        ]
        assert fits == sorted(fits), (model.layers, changes, product)


def test_more_memory_never_refuses_what_less_fits() -> None:
    for model, changes in itertools.product((LLAMA_8B, LLAMA_70B), ({}, LORA)):
        fits = [
            isinstance(choose(model, sized(**changes), gpus(product)), Choice)
            for product in ("A10G", "A100-40GB", "L40S", "A100-80GB", "H100-NVL", "H200", "B200")
        ]
        assert fits == sorted(fits)


def test_a_refusal_names_the_memory_and_what_would_fit() -> None:
    found = refused(LLAMA_70B, sized(**{"data.maxLength": 2048}), H200)
    assert found.field == "spec.resources"
    assert "the model does not fit 1 node of 8 H200: " in found.message
    assert "tensor 8, pipeline 1, full recomputation and packs of 4,096 tokens need " in found.message
    assert "optimizer " in found.message
    assert "125.1 GiB of a GPU's 139.0 GiB (10 % is kept free)" in found.message
    assert "2 nodes of 8 H200 would fit (tensor " in found.message
    assert "and lora would fit these (tensor " in found.message


def test_a_refusal_of_few_gpus_names_more_on_the_same_node() -> None:
    assert "1 node of 8 A10G would fit (tensor " in refused(LLAMA_8B, sized(), gpus("A10G", 1)).message


def test_what_no_number_of_gpus_fits_says_so() -> None:
    huge = sized(**{"parallelism.tensor": 1, "data.maxLength": 1_000_000})
    assert "no number of them would fit" in refused(LLAMA_405B, huge, gpus("A10G")).message


def test_sizes_that_divide_nothing_are_named() -> None:
    found = refused(LLAMA_8B, sized(**{"parallelism.tensor": 3}), H100)
    assert found.message == "no layout of 8 processes divides the model; leave parallelism.tensor out"


def test_the_pinned_spec_keeps_what_its_author_wrote() -> None:
    written = job({"spec.parallelism": {"tensor": 2}})
    assert written.to_dict()["spec"]["parallelism"] == {"tensor": 2}
    assert "training" not in written.to_dict()["spec"]
    assert set_sizes(load_manifest(written.to_json()).spec) == {"tensor"}
    assert set_sizes(job({"spec.parallelism": {"tensor": None}}).spec) == frozenset()
    assert set_sizes(without_sizes(written.spec)) == frozenset()


def test_a_layout_makes_every_size_explicit() -> None:
    found = chosen(LLAMA_70B, sized(**LORA), H100)
    ran = with_layout(sized(**LORA), found.best.layout)
    assert set_sizes(ran) == {"tensor", "pipeline", "sequence", "recomputation", "pack_tokens"}
    again = chosen(LLAMA_70B, ran, H100)
    assert again.best.layout == found.best.layout
    assert again.chosen == frozenset()
