"""The layout of a run: rank 0 chooses it before the model is loaded, and later attempts use what it chose.

``layout.json`` in the run directory records the choice, with what it was made for. It is no part of a checkpoint: one
that is missing, damaged or made for other hardware or other sizes is made again.
"""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dpo_api.errors import IncompatibleCheckpointError, InvalidSpecError
from dpo_api.models import ModelFacts, read_config
from dpo_api.sizing import (
    SIZES,
    Choice,
    Hardware,
    Layout,
    Product,
    Refusal,
    candidates,
    choose,
    hardware_named,
    layout_of,
    memory_of_stage,
    product_named,
    set_sizes,
    stages,
    with_layout,
)
from dpo_api.sizing.texts import hardware_text, layout_text, limit_text, memory_text
from dpo_api.spec import DPOJobSpec
from dpo_api.texts import size
from dpo_api.validation import refuse_errors
from dpo_trainer.distributed import World
from dpo_trainer.rundir import LAYOUT, RunDirectory
from dpo_trainer.sources import model_source, settled


@dataclass(frozen=True)
class Decision:
    """A layout, and the record of how it was found; no record on CPU, where nothing is chosen."""

    layout: Layout
    record: dict[str, Any] | None = None
    said: str = ""
    """What the log says about it."""
    predicted_memory: int | None = None
    """Bytes that rank 0's GPU, which is of the first stage, is predicted to take; None on CPU."""

    def runner_up(self) -> "Decision | None":
        """Return the decision for the next attempt after this layout ran out of memory; None if there is none.

        A runner-up is taken once: the prediction is then too far off to try a third layout.
        """
        record = self.record
        if record is None or "ranOutOfMemory" in record or not record["runnersUp"]:
            return None
        first, *rest = record["runnersUp"]
        kept = {name: value for name, value in record.items() if name not in ("memory", "seconds")}
        changed = {**kept, "layout": first, "runnersUp": rest, "ranOutOfMemory": asdict(self.layout)}
        layout = Layout(**first)
        return Decision(layout, changed, f"{layout_text(layout)} instead of {layout_text(self.layout)}")

    def runs(self, spec: DPOJobSpec) -> DPOJobSpec:
        """Return the spec that runs: with the chosen sizes, or as its author wrote it where nothing was chosen."""
        return spec if self.record is None else with_layout(spec, self.layout)


def agreed(spec: DPOJobSpec, world: World, directory: RunDirectory, hardware: Hardware | None) -> Decision:
    """Return rank 0's decision on every rank: a collective, before Megatron-Core's groups exist.

    hardware: None on CPU; then each rank reads the sizes from the spec, and there is nothing to agree on. Raises what
    ``decide`` raises, and what reading the model's configuration and the run directory raises, on rank 0.
    """
    if hardware is None:
        return Decision(layout_of(spec, world.size))

    def on_main() -> dict[str, Any]:
        store, folder = model_source(spec)
        config = read_config(store, folder)
        job = settled(spec, config)
        refuse_errors(job, config.facts)
        return asdict(decide(job, config.facts, hardware, _saved(directory)))

    found = world.from_main(on_main() if world.is_main else None)
    assert found is not None  # noqa: S101 - rank 0 ends if it has none
    return Decision(**{**found, "layout": Layout(**found["layout"])})


def _saved(directory: RunDirectory) -> dict[str, Any] | None:
    try:
        return directory.read_json(LAYOUT)
    except IncompatibleCheckpointError:  # not JSON
        return None


def hardware_here(processes: int) -> Hardware | None:
    """Return the GPUs of a run with this many processes, from this one's; None on CPU.

    The memory is the table's, so that `dpo validate` predicts the same, or this GPU's if that is less.
    """
    if not torch.cuda.is_available():
        return None
    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or min(processes, torch.cuda.device_count())
    return with_memory(divided(processes, local, here.name), here.total_memory)


def product_here() -> Product | None:
    """Return the product of this process's GPU; None on CPU, and for one that the table does not have."""
    return product_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def divided(processes: int, local: int, name: str | None) -> Hardware:
    """Return the hardware of a run with ``local`` processes on each node.

    If nodes have different numbers of processes, each process counts as a node: nothing is divided within one then.
    """
    nodes, rest = divmod(processes, local)
    return hardware_named(processes, 1, name) if rest else hardware_named(nodes, local, name)


def with_memory(hardware: Hardware, memory: int) -> Hardware:
    """Return the hardware with the memory that a driver reports: less than the table's, or of an unknown product."""
    product = hardware.product
    if hardware.known and product.memory <= memory:
        return hardware
    return replace(hardware, product=replace(product, memory=memory), known=True)


def decide(spec: DPOJobSpec, model: ModelFacts, hardware: Hardware, saved: dict[str, Any] | None) -> Decision:
    """Return the layout of a run: what ``saved``, the record of an earlier attempt, holds, or a new choice.

    Raises InvalidSpecError naming what does not fit, and the nearest layout that would.
    """
    made_for = _made_for(spec, hardware)
    kept = _layout_in(saved, made_for)
    if kept is not None and kept in candidates(model, spec, hardware):
        why = ", since another one ran out of memory" if saved is not None and "ranOutOfMemory" in saved else ""
        said = f"layout of an earlier attempt{why}: {layout_text(kept)}"
        return Decision(kept, saved, said, _first_stage(spec, model, kept))
    found = choose(model, spec, hardware)
    if isinstance(found, Refusal):
        raise InvalidSpecError(f"{found.field}: {found.message}")
    record = {
        "layout": asdict(found.best.layout),
        "chosen": sorted(SIZES[name] for name in found.chosen),
        "memory": asdict(found.best.memory),
        "seconds": found.best.seconds,
        "runnersUp": [asdict(other.layout) for other in found.runners_up],
        "madeFor": made_for,
    }
    layout = found.best.layout
    return Decision(layout, record, _reasons(found), _first_stage(spec, model, layout))


def _first_stage(spec: DPOJobSpec, model: ModelFacts, layout: Layout) -> int:
    return memory_of_stage(model, spec, layout, stages(model.layers, layout.pipeline)[0]).total


def _made_for(spec: DPOJobSpec, hardware: Hardware) -> dict[str, Any]:
    """What a choice depends on that may differ between attempts."""
    sizes = asdict(layout_of(spec, hardware.processes))
    return {
        "nodes": hardware.nodes,
        "gpus": hardware.gpus,
        "product": hardware.product.name,
        "memory": hardware.product.memory,
        "set": {name: sizes[name] for name in sorted(set_sizes(spec))},
        "maxLength": spec.data.max_length,
    }


def _layout_in(saved: dict[str, Any] | None, made_for: dict[str, Any]) -> Layout | None:
    """Return a record's layout if it was made for the same; None if there is none that can be used."""
    if saved is None or saved.get("madeFor") != made_for:
        return None
    try:
        return Layout(**saved["layout"])
    except (KeyError, TypeError):
        return None


def _reasons(found: Choice) -> str:
    """Say what was chosen and why, on a few lines."""
    hardware = found.hardware
    lines = [
        f"layout: {layout_text(found.best.layout, found.chosen)}, on {hardware_text(hardware)}",
        f"  {found.fitting} of {found.tried} layouts fit, and this one has the shortest predicted step",
        f"  predicted memory of a GPU: {memory_text(found.best.memory)}; {limit_text(hardware, found.limit)}",
    ]
    lines += [f"  runner-up: {layout_text(other.layout)}, {size(other.memory.total)}" for other in found.runners_up]
    return "\n".join(lines)
