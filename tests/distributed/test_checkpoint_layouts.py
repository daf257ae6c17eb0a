"""What one layout saves, every other one loads: masters and moments bit for bit, by Hugging Face name."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_testing.checkpoint_ranks import LAYOUTS, Case, plan
from dpo_testing.preloaded import PreloadedPopen, usable
from dpo_testing.runs import PACKAGES, merged
from dpo_testing.training_world import make
from dpo_trainer.checkpoint.boxes import rectangles

LORA = {"lora": {"rank": 4, "alpha": 8, "targetModules": ["all"]}}
BF16 = {"training": {"precision": "bf16"}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The model's overrides, and the spec's.
    "all weights, vocabulary of 385": ({"vocab_size": 385}, {}),
    "bf16, tied, biases": ({"variant": "qwen2", "tie_word_embeddings": True}, BF16),
    "bf16, norms of queries and keys": ({"variant": "qwen3", "vocab_size": 387}, BF16),
    "LoRA": ({}, LORA),
    "LoRA, one stage's layers": ({}, merged(merged(LORA, BF16), {"lora": {"layers": [3]}})),
}
MOST = max(layout.processes for layout in LAYOUTS.values())


def run(folder: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """Let the processes work through the cases; return what each of them found."""
    plan(folder, cases)
    variables = {**os.environ, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    popen = PreloadedPopen if usable() else subprocess.Popen
    processes = []
    for rank in range(MOST):
        command = [sys.executable, "-m", "dpo_testing.checkpoint_ranks", str(folder)]
        place = {"RANK": str(rank), "WORLD_SIZE": str(MOST)}
        with (folder / f"rank-{rank}.log").open("wb") as log:
            processes.append(popen(command, env={**variables, **place}, stdout=log, stderr=log))
    try:
        # The first that fails ends the test: the others wait for it.
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * MOST, "\n".join((folder / f"rank-{rank}.log").read_text()[-2000:] for rank in range(MOST))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(MOST)]


def case(name: str, folder: Path, **more: Any) -> Case:
    model, changes = CASES[name]
    spec = merged(make(folder / "worlds" / name, pairs=1, validation=1, num_hidden_layers=4, **model), changes)
    return Case(name, spec, **more)


def check_bytes(found: list[dict[str, Any]]) -> None:
    """Each rank saves 12 bytes for each parameter of its share, and padding at most, and holds as much meanwhile."""
    for rank, what in enumerate(found):
        assert what["held"].keys() == {name for name, saved in what["handed over"].items() if saved}
        for name, saved in what["handed over"].items():
            assert saved <= 12 * what["shares"][name], f"{name}, rank {rank}"
            assert what["held"].get(name, 0) <= 12 * what["shares"][name], f"{name}, rank {rank}"
    totals: dict[str, int] = {}
    for what in found:
        for name, held in what["handed over"].items():
            totals[name] = totals.get(name, 0) + held
    for name in CASES:
        of_case = {total for key, total in totals.items() if key.startswith(f"{name}: ")}
        assert len(of_case) <= 1, f"{name}: not every layout saves each value once: {of_case}"


@pytest.mark.slow
@pytest.mark.xdist_group("checkpoint-layouts")
def test_each_layout_loads_what_others_save(tmp_path: Path) -> None:
    """Each layout saves, and each loads; the pairs of them are nightly."""
    whole, lora = "all weights, vocabulary of 385", "LoRA, one stage's layers"
    found = run(
        tmp_path,
        [
            case(whole, tmp_path, saving=["TP4 of 2 groups", "DP3"], loading=["one", "TP2 PP2", "CP2"]),
            case(
                "bf16, tied, biases",
                tmp_path,
                saving=["PP3 of 4 layers", "DP2, plain"],
                loading=["DP2 TP2", "TP2", "DP2, plain"],
            ),
            case(lora, tmp_path, saving=["DP2 PP2", "TP2", "CP2"], loading=["PP3 of 4 layers", "TP4 of 2 groups"]),
        ],
    )
    assert [wrong for what in found for wrong in what["wrong"]] == []
    check_bytes(found)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.xdist_group("checkpoint-layouts")
@pytest.mark.parametrize("name", CASES)
def test_every_layout_loads_what_every_layout_saves(name: str, tmp_path: Path) -> None:
    found = run(tmp_path, [case(name, tmp_path)])
    assert [wrong for what in found for wrong in what["wrong"]] == []
    check_bytes(found)


@pytest.mark.slow
@pytest.mark.xdist_group("checkpoint-layouts")
def test_every_layout_loads_format_1(tmp_path: Path) -> None:
    """Megatron-Core's own checkpoints, by its distributed and its plain optimizer, in fp32 and bf16."""
    whole, tied, lora = "all weights, vocabulary of 385", "bf16, tied, biases", "LoRA"
    found = run(
        tmp_path,
        [
            case(whole, tmp_path, saving=["one", "TP2"], loading=["TP4 of 2 groups", "DP2 PP2"], format_1=True),
            # Versions that wrote format 1 had no buckets, in which Megatron-Core's writer mixes up the parameters.
            case(tied, tmp_path, saving=["one, plain", "one"], loading=["TP2 PP2"], format_1=True),
            case(lora, tmp_path, saving=["one, plain"], loading=["DP2 TP2"], format_1=True),
        ],
    )
    assert [wrong for what in found for wrong in what["wrong"]] == []


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=300, deadline=None)
def test_boxes_tile_every_range(rows: int, columns: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows * columns))
    end = data.draw(st.integers(start, rows * columns))
    found = list(rectangles((rows, columns), start, end))
    assert len(found) <= 3
    seen: list[int] = []
    for (row, column), (height, width), first in found:
        assert first == row * columns + column
        assert width == columns or height == 1  # contiguous
        seen += [(row + i) * columns + column + j for i in range(height) for j in range(width)]
    assert seen == list(range(start, end))
    assert [(at, size) for at, size, _ in rectangles((rows,), min(start, rows), min(end, rows)) if True] == (
        [((min(start, rows),), (min(end, rows) - min(start, rows),))] if min(start, rows) < min(end, rows) else []
    )
