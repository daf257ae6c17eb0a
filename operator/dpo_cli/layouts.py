"""Shows the layout that a job runs in: its sizes, why it was chosen, its memory, and the runners-up."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dpo_api.sizing import SIZES, Candidate, Choice
from dpo_api.sizing.texts import hardware_text, layout_text, limit_text, memory_text
from dpo_api.texts import elapsed, size
from dpo_cli.effective import Row

ASSUMPTION = "no GPU is named: set resources.gpuProduct, or a node selector such as nvidia.com/gpu.product"


def layout_rows(choice: Choice) -> list[Row]:
    """Return (label, text) of every line."""
    best, hardware = choice.best, choice.hardware
    found = [("layout", layout_text(best.layout, choice.chosen))]
    found.append(("", f"on {hardware_text(hardware)}" + ("" if hardware.known else f", assumed: {ASSUMPTION}")))
    if choice.chosen:
        which = f"of {choice.tried:,} layouts, {choice.fitting:,} fit; this one has the shortest predicted step"
        found.append(("", f"{which}, {elapsed(best.seconds)}"))
    found.append(("memory", memory_text(best.memory)))
    found.append(("", f"a layout may take {limit_text(hardware, choice.limit)}"))
    return [*found, *(("runner-up", _runner_up(other, best)) for other in choice.runners_up)]


def _runner_up(other: Candidate, best: Candidate) -> str:
    return f"{layout_text(other.layout)}: {size(other.memory.total)}, {other.seconds / best.seconds:.2f} times as long"


def json_of(choice: Choice) -> dict[str, Any]:
    """Return the choice as JSON values. Bytes are of one GPU, of the stage that takes the most."""
    hardware = choice.hardware
    return {
        **_candidate(choice.best),
        "chosen": sorted(SIZES[name] for name in choice.chosen),
        "limitBytes": choice.limit,
        "tried": choice.tried,
        "fitting": choice.fitting,
        "hardware": {
            "nodes": hardware.nodes,
            "gpusPerNode": hardware.gpus,
            "gpuProduct": hardware.product.name,
            "assumed": not hardware.known,
        },
        "runnersUp": [_candidate(other) for other in choice.runners_up],
    }


def _candidate(found: Candidate) -> dict[str, Any]:
    layout = {**asdict(found.layout)}
    layout["packTokens"] = layout.pop("pack_tokens")
    memory = {"".join([head, *(word.title() for word in rest)]): value for (head, *rest), value in _split(found)}
    return {"sizes": layout, "memoryBytes": {**memory, "total": found.memory.total}, "stepSeconds": found.seconds}


def _split(found: Candidate) -> list[tuple[list[str], int]]:
    return [(name.split("_"), value) for name, value in asdict(found.memory).items()]
