"""Writes layouts, predictions and refusals as text."""

from __future__ import annotations

from dpo_api.sizing.layout import Layout
from dpo_api.sizing.memory import FREE_SHARE, Memory
from dpo_api.sizing.speed import Hardware
from dpo_api.texts import counted, percent, size


def layout_text(layout: Layout, chosen: frozenset[str] | None = None) -> str:
    """Write a layout on one line. With ``chosen``, the sizes that the author has set are marked."""

    def mark(name: str) -> str:
        return "" if chosen is None or name in chosen else " (set)"

    parts = [f"tensor {layout.tensor}{mark('tensor')}", f"pipeline {layout.pipeline}{mark('pipeline')}"]
    if layout.context > 1:
        parts.append(f"context {layout.context} (set)")
    parts.append(f"data {layout.data}")
    if layout.sequence:
        parts.append(f"sequence parallel{mark('sequence')}")
    parts.append(f"{layout.recomputation} recomputation{mark('recomputation')}".replace("none ", "no "))
    return ", ".join([*parts, f"packs of {layout.pack_tokens:,} tokens{mark('pack_tokens')}"])


def sizes_text(layout: Layout) -> str:
    """Write the sizes that decide whether a model fits, on one line."""
    divided = f"tensor {layout.tensor}, pipeline {layout.pipeline}"
    if layout.context > 1:
        divided += f", context {layout.context}"
    return f"{divided}, {layout.recomputation} recomputation".replace("none ", "no ")


def hardware_text(hardware: Hardware) -> str:
    """Write the GPUs of a run: 4 nodes of 8 H100-80GB."""
    return f"{counted(hardware.nodes, 'node')} of {hardware.gpus} {hardware.product.name}"


def limit_text(hardware: Hardware, limit: int) -> str:
    """Write what a layout may take of each GPU."""
    whole = size(hardware.product.memory)
    return f"{size(limit)} of a GPU's {whole} ({percent(FREE_SHARE).replace('.0%', ' %')} is kept free)"


def memory_text(memory: Memory) -> str:
    """Write a GPU's predicted memory by what takes it, without what takes nothing."""
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "activations": "activations",
        "adapter_activations": "adapters' activations",
        "logits": "logits",
    }
    parts = [f"{name} {size(getattr(memory, field))}" for field, name in names.items() if getattr(memory, field)]
    return f"{size(memory.total)}: {', '.join(parts)}"
