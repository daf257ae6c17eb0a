"""The layout of a run: chosen before the model is loaded, recorded, and used by later attempts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from dpo_api.errors import InvalidSpecError
from dpo_api.sizing import Layout, layout_of, with_layout
from dpo_testing.sizes import LLAMA_1B, LLAMA_405B, gpus, sized
from dpo_trainer.layouts import Decision, decide, divided, hardware_here, with_memory


def recorded(record: dict[str, Any] | None) -> dict[str, Any]:
    """Return a record as the run directory gives it back."""
    assert record is not None
    read: dict[str, Any] = json.loads(json.dumps(record))
    return read


def test_nothing_is_chosen_on_cpu() -> None:
    assert hardware_here(2) is None
    found = Decision(layout_of(sized(), 2))
    assert (found.layout.short, found.layout.recomputation, found.layout.pack_tokens) == ("T1 P1 D2", "none", 8192)
    assert not found.layout.sequence
    assert found.runs(sized()) == sized()


def test_sizes_that_are_set_hold_on_cpu_too() -> None:
    spec = sized(**{"parallelism.tensor": 2, "training.packing.maxTokens": 9000})
    layout = layout_of(spec, 4)
    assert (layout.short, layout.pack_tokens) == ("T2 P1 D2", 9000)
    assert with_layout(spec, layout).training.packing.max_tokens == 9000


def test_a_choice_says_why() -> None:
    found = decide(sized(), LLAMA_1B, gpus("H100-80GB"), None)
    assert found.said.startswith(f"layout: tensor 1, pipeline 1, data {8 // found.layout.model_size}")
    assert "predicted memory of a GPU: " in found.said
    record = recorded(found.record)
    assert record["layout"] == asdict(found.layout)
    assert record["memory"]["weights"] == 2 * 1_235_814_400
    assert found.predicted_memory == sum(record["memory"].values()), "one stage holds everything"


def test_a_later_attempt_uses_the_record() -> None:
    hardware = gpus("H100-80GB")
    first = decide(sized(), LLAMA_1B, hardware, None)
    other = {**recorded(first.record), "layout": {**asdict(first.layout), "pack_tokens": 8192}}
    again = decide(sized(), LLAMA_1B, hardware, other)
    assert again.layout.pack_tokens == 8192
    assert again.said.startswith("layout of an earlier attempt: ")
    assert again.record == other
    assert again.predicted_memory is not None
    assert first.predicted_memory is not None
    assert again.predicted_memory < first.predicted_memory, "the pack is smaller"


@pytest.mark.parametrize(
    ("changes", "hardware"),
    [
        ({"parallelism.tensor": 1}, gpus("H100-80GB")),
        ({"data.maxLength": 2048}, gpus("H100-80GB")),
        ({}, gpus("H100-80GB", nodes=2)),
        ({}, gpus("H200")),
    ],
    ids=["a size is set", "another length", "more nodes", "another GPU"],
)
def test_another_situation_is_another_choice(changes: dict[str, Any], hardware: Any) -> None:
    before = decide(sized(), LLAMA_1B, gpus("H100-80GB"), None)
    again = decide(sized(**changes), LLAMA_1B, hardware, recorded(before.record))
    assert again.said.startswith("layout: ")


NOT_OF_EIGHT = asdict(Layout(3, 1, 1, 2, True, "none", 8192))


@pytest.mark.parametrize(
    "damage", [{}, {"layout": {}}, {"layout": None}, {"layout": {"tensor": 3}}, {"layout": NOT_OF_EIGHT}]
)
def test_a_damaged_record_is_made_again(damage: dict[str, Any]) -> None:
    first = decide(sized(), LLAMA_1B, gpus("H100-80GB"), None)
    madefor = {"madeFor": recorded(first.record)["madeFor"]} if damage else {}
    again = decide(sized(), LLAMA_1B, gpus("H100-80GB"), {**madefor, **damage})
    assert again.layout == first.layout
    assert again.said.startswith("layout: ")


def test_what_cannot_fit_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(InvalidSpecError, match=r"^spec\.resources: the model does not fit 1 node of 8 A10G: "):
        decide(sized(), LLAMA_405B, gpus("A10G"), None)


def test_the_nodes_are_those_of_the_processes() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert divided(16, 8, name) == gpus("H100-80GB", nodes=2)
    assert divided(4, 4, name) == gpus("H100-80GB", per_node=4)
    assert divided(6, 4, name) == gpus("H100-80GB", per_node=1, nodes=6)
    assert divided(8, 8, "Tesla T4") == gpus("H100-80GB", known=False)


def test_the_drivers_memory_counts_where_it_is_less() -> None:
    table = gpus("H100-80GB")
    assert with_memory(table, 85 * 2**30) == table
    assert with_memory(table, 40 * 2**30).product.memory == 40 * 2**30
    unknown = with_memory(gpus("H100-80GB", known=False), 16 * 2**30)
    assert (unknown.known, unknown.product.memory) == (True, 16 * 2**30)
