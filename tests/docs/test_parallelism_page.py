"""The tables of docs/parallelism.md and the predictions in the examples are those of the memory model.

After a wanted change: UPDATE_GOLDEN=1 python -m pytest tests/docs/test_parallelism_page.py, then read the diff.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_api.manifest import load_manifest
from dpo_api.models import ModelFacts
from dpo_api.sizing import (
    PRODUCTS,
    Choice,
    Hardware,
    Layout,
    candidates,
    choose,
    hardware_of,
    memory_limit,
    memory_of,
)
from dpo_api.sizing.layout import Recomputation
from dpo_api.spec import DPOJobSpec
from dpo_cli.layouts import layout_rows
from dpo_testing.sizes import LLAMA_8B, LLAMA_70B, MODELS, gpus, sized

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "parallelism.md"

LORA = {"lora": {"rank": 32, "targetModules": ["attention_qkv"]}}
CASES = [
    *((model, kind, "H100-80GB", 1) for model in MODELS for kind in ("LoRA", "full")),
    *((model, "full", "H100-80GB", nodes) for model in ("Llama 3 8B", "Qwen3 32B", "Llama 3 70B") for nodes in (2, 4)),
    *((model, kind, "H200", 1) for model in ("Llama 3 8B", "Llama 3 70B") for kind in ("LoRA", "full")),
    *(("Llama 3 70B", "full", "H200", nodes) for nodes in (2, 4)),
    ("Llama 3.1 405B", "LoRA", "H200", 2),
    ("Llama 3.1 405B", "full", "H200", 16),
    ("Llama 3 8B", "LoRA", "L40S", 1),
    ("Llama 3 8B", "LoRA", "A100-40GB", 1),
]
"""(model, what is trained, GPU, nodes of eight): thirty cases."""

FITS: list[tuple[ModelFacts, str, str, int, tuple[int, int]]] = [
    (LLAMA_8B, "full", "H100-80GB", 1, (1, 1)),
    (LLAMA_8B, "full", "H100-80GB", 1, (2, 1)),
    (LLAMA_8B, "full", "H100-80GB", 4, (1, 1)),
    (LLAMA_8B, "full", "H100-80GB", 4, (2, 1)),
    (LLAMA_8B, "full", "H200", 1, (1, 1)),
    (LLAMA_8B, "full", "H200", 1, (2, 1)),
    (LLAMA_70B, "LoRA", "H100-80GB", 1, (4, 2)),
    (LLAMA_70B, "LoRA", "H100-80GB", 1, (8, 1)),
    (LLAMA_70B, "LoRA", "H200", 1, (8, 1)),
    (LLAMA_70B, "full", "H200", 1, (8, 1)),
    (LLAMA_70B, "full", "H100-80GB", 4, (8, 1)),
    (LLAMA_70B, "full", "H100-80GB", 4, (8, 2)),
    (LLAMA_70B, "full", "H100-80GB", 4, (8, 4)),
    (LLAMA_70B, "full", "H100-80GB", 4, (4, 4)),
]


def spec_of(kind: str) -> DPOJobSpec:
    return sized(**{"training.globalBatchSize": 256, **(LORA if kind == "LoRA" else {})})


def chosen_rows() -> list[str]:
    rows = ["| model | trains | GPUs | T × P × D | recomputation | pack | of a GPU |", "|---|---|---|---|---|---|---|"]
    for model, kind, product, nodes in CASES:
        hardware = gpus(product, nodes=nodes)
        found = choose(MODELS[model], spec_of(kind), hardware)
        where = f"{nodes} × 8 {product}"
        if not isinstance(found, Choice):
            rows.append(f"| {model} | {kind} | {where} | does not fit | | | |")
            continue
        layout, memory = found.best.layout, found.best.memory
        sizes = f"{layout.tensor} × {layout.pipeline} × {layout.data}"
        rows.append(
            f"| {model} | {kind} | {where} | {sizes} | {layout.recomputation} | {layout.pack_tokens:,} |"
            f" {memory.total / 2**30:.0f} GiB |"
        )
    return rows


def fits_rows() -> list[str]:
    rows = ["| model, GPUs | T × P × D | state | none | selective | full |", "|---|---|---|---|---|---|"]
    for model, kind, product, nodes, (tensor, pipeline) in FITS:
        hardware = gpus(product, nodes=nodes)
        data = hardware.processes // (tensor * pipeline)
        base = Layout(tensor, pipeline, 1, data, tensor > 1, "none", 0)
        name = "Llama 3 8B" if model is LLAMA_8B else "Llama 3 70B"
        packs = [largest_pack(model, spec_of(kind), replace(base, recomputation=r), hardware) for r in RECOMPUTATIONS]
        state = memory_of(model, spec_of(kind), base).total / 2**30
        cells = " | ".join(f"{pack // 1000}k" if pack >= 1000 else "" for pack in packs)
        rows.append(
            f"| {name} {kind}, {nodes} × 8 {product} | {tensor} × {pipeline} × {data} | {state:.0f} GiB | {cells} |"
        )
    return rows


RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "full")


def largest_pack(model: ModelFacts, spec: DPOJobSpec, layout: Layout, hardware: Hardware) -> int:
    """Return the tokens of the largest pack that a layout fits with."""
    low, high = 0, 1 << 22
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory_of(model, spec, replace(layout, pack_tokens=middle)).total <= memory_limit(hardware)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def products_rows() -> list[str]:
    return [
        "| GPU | memory | bf16 | NVLink or PCIe | network per GPU |",
        "|---|---|---|---|---|",
        *(
            f"| {p.name} | {p.memory // 2**30} GiB | {p.tflops:,.0f} TFLOP/s | {p.nvlink:g} GB/s | {p.network:g} GB/s |"
            for p in PRODUCTS
        ),
    ]


TABLES: dict[str, Callable[[], list[str]]] = {"fits": fits_rows, "chosen": chosen_rows, "products": products_rows}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_model(name: str) -> None:
    text = PAGE.read_text()
    section = re.compile(rf"(<!-- table: {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    found = section.search(text)
    assert found is not None, f"docs/parallelism.md has no place for the table {name}"
    table = "\n".join(TABLES[name]()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(section.sub(lambda match: match[1] + table + match[3], text))
        return
    assert found[2] == table, "see the top of this file"


def test_the_table_has_thirty_cases() -> None:
    assert len(set(CASES)) == len(CASES) == 30


EXAMPLES = {"llama3-8b-full": LLAMA_8B, "llama3-70b-lora": LLAMA_70B, "llama3-70b-full": LLAMA_70B}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_predicts_its_memory(name: str) -> None:
    path = ROOT / "examples" / f"{name}.yaml"
    spec, text = load_manifest(path).spec, path.read_text()
    hardware = hardware_of(spec)
    assert hardware is not None
    found = choose(EXAMPLES[name], spec, hardware)
    assert isinstance(found, Choice)
    assert found.best.layout in set(candidates(EXAMPLES[name], spec, hardware))
    said = "".join(f"#   {label:<11} {line}\n" for label, line in layout_rows(found))
    section = re.compile(r"(# [^\n]*held:\n#\n)((?:#   [^\n]*\n)+|# \(layout\)\n)")
    before = section.search(text)
    assert before is not None, f"{path.name} has no place for its prediction"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(section.sub(lambda match: match[1] + said, text))
        return
    assert before[2] == said, "see the top of this file"
