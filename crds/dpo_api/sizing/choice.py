"""Chooses the sizes that a spec leaves out: the fastest layout that fits the GPUs' memory.

A pure function of the model's facts, the spec and the hardware: `dpo validate` and a pod choose the same. What the
author has set is kept. A layout fits if it leaves FREE_SHARE of the memory free. Among those that fit, the one with the
shortest predicted step is chosen; of equally fast ones, the one that divides the model least, then the one that needs
less memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpo_api.models import ModelFacts
from dpo_api.sizing.layout import (
    SIZES,
    Layout,
    Recomputation,
    divides_heads,
    divisors,
    layout_of,
    set_sizes,
    smallest_pack,
)
from dpo_api.sizing.memory import FREE_SHARE, Memory, memory_of
from dpo_api.sizing.products import assumed, product_named, product_of
from dpo_api.sizing.speed import Hardware, step_seconds
from dpo_api.sizing.texts import hardware_text, limit_text, memory_text, sizes_text
from dpo_api.spec import DPOJobSpec, Lora

RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "full")

PACK_FACTORS = (1, 2, 4)
"""Sizes of packs that are tried, in units of the smallest pack that holds every pair."""

PACK_MOST = 16_384
"""Larger packs are not chosen unless a pair may need one: they save next to nothing."""

NODES_MOST = 1024
NODE_GPUS = 8
"""Numbers of nodes, and of GPUs of a node, up to which a refusal looks for what would fit."""

RUNNERS_UP = 3

LESS = 0.95
"""A runner-up takes at most this share of the memory of the one before it: else it would run out of memory too."""


@dataclass(frozen=True)
class Candidate:
    """A layout, the memory that it takes of a GPU, and the predicted seconds of a step."""

    layout: Layout
    memory: Memory
    seconds: float


@dataclass(frozen=True)
class Choice:
    """The chosen layout."""

    best: Candidate
    runners_up: tuple[Candidate, ...]
    """The next ones: slower, and each with less memory than the one before."""
    fitting: int
    """How many layouts fit."""
    tried: int
    chosen: frozenset[str]
    """The sizes (attributes of Layout) that were chosen; the author has set the others."""
    hardware: Hardware
    limit: int
    """Bytes of a GPU that a layout may take."""


@dataclass(frozen=True)
class Refusal:
    """No layout fits."""

    field: str
    message: str


def memory_limit(hardware: Hardware) -> int:
    """Bytes of a GPU that a layout may take."""
    return int(hardware.product.memory * (1 - FREE_SHARE))


def hardware_of(spec: DPOJobSpec) -> Hardware | None:
    """Return the GPUs that a spec asks for; None if it trains on CPU or does not say."""
    resources = spec.resources
    if not resources.gpus_per_node:
        return None
    product = product_of(spec)
    return Hardware(resources.nodes, resources.processes(), product or assumed(), known=product is not None)


def hardware_named(nodes: int, gpus: int, name: str | None) -> Hardware:
    """Return GPUs whose driver gives them a name."""
    product = None if name is None else product_named(name)
    return Hardware(nodes, gpus, product or assumed(), known=product is not None)


def choose(model: ModelFacts, spec: DPOJobSpec, hardware: Hardware) -> Choice | Refusal:
    """Choose the sizes that the spec leaves out. On CPU nothing is chosen: do not call it."""
    limit = memory_limit(hardware)
    tried = [
        Candidate(layout, memory_of(model, spec, layout), step_seconds(model, spec, layout, hardware))
        for layout in candidates(model, spec, hardware)
    ]
    fitting = sorted((found for found in tried if found.memory.total <= limit), key=_rank)
    if not fitting:
        return _refuse(model, spec, hardware, tried)
    best, *rest = fitting
    runners_up: list[Candidate] = []
    for found in rest:
        before = runners_up[-1] if runners_up else best
        if len(runners_up) < RUNNERS_UP and found.memory.total <= LESS * before.memory.total:
            runners_up.append(found)
    chosen = frozenset(SIZES) - set_sizes(spec)
    return Choice(best, tuple(runners_up), len(fitting), len(tried), chosen, hardware, limit)


def _rank(found: Candidate) -> tuple[float, int, int]:
    """Fastest first; times that are equal to three digits are equal."""
    return float(f"{found.seconds:.3g}"), found.layout.model_size, found.memory.total


def candidates(model: ModelFacts, spec: DPOJobSpec, hardware: Hardware) -> Iterator[Layout]:
    """Yield every layout that has the sizes that the author set and divides the processes and the model."""
    kept, base = set_sizes(spec), layout_of(spec, hardware.processes)
    tensors = [base.tensor] if "tensor" in kept else [t for t in divisors(hardware.gpus) if _can_divide(model, spec, t)]
    for tensor in tensors:
        if hardware.processes % (tensor * base.context):
            continue
        rest = hardware.processes // (tensor * base.context)
        pipelines = [p for p in divisors(rest) if p <= model.layers]
        for pipeline in [base.pipeline] if "pipeline" in kept else pipelines:
            if rest % pipeline:
                continue
            sized = replace(base, tensor=tensor, pipeline=pipeline, data=rest // pipeline)
            yield from _of_sizes(spec, sized, kept)


def _of_sizes(spec: DPOJobSpec, sized: Layout, kept: frozenset[str]) -> Iterator[Layout]:
    """Yield the variants of a layout whose tensor and pipeline sizes are decided."""
    sequence = sized.sequence if "sequence" in kept else sized.tensor > 1
    for recomputation in [sized.recomputation] if "recomputation" in kept else RECOMPUTATIONS:
        for pack in [sized.pack_tokens] if "pack_tokens" in kept else _packs(spec, sized.data):
            yield replace(sized, sequence=sequence, recomputation=recomputation, pack_tokens=pack)


def _can_divide(model: ModelFacts, spec: DPOJobSpec, tensor: int) -> bool:
    whole = all(size % tensor == 0 for size in (model.ffn, *([spec.lora.rank] if spec.lora else ())))
    return whole and divides_heads(model, tensor)


def _packs(spec: DPOJobSpec, data: int) -> list[int]:
    """Return sizes of packs: no larger than a rank's part of a global batch or than microBatchSize allows."""
    smallest, pairs = smallest_pack(spec), -(-spec.training.global_batch_size // data)
    most = min(PACK_MOST, pairs * smallest, (spec.training.micro_batch_size or pairs) * smallest)
    return [smallest, *(factor * smallest for factor in PACK_FACTORS[1:] if factor * smallest <= most)]


def _refuse(model: ModelFacts, spec: DPOJobSpec, hardware: Hardware, tried: list[Candidate]) -> Refusal:
    """Return the error for a spec without a layout that fits, with the nearest one that would."""
    kept = set_sizes(spec)
    fields = [field for name, field in SIZES.items() if name in kept]
    if not tried:
        which = f"leave {' and '.join(fields)} out" if fields else "use another number of GPUs"
        which += " or another parallelism.context" if spec.parallelism.context > 1 else ""
        return Refusal("spec.parallelism", f"no layout of {hardware.processes} processes divides the model; {which}")
    least = min(tried, key=lambda found: found.memory.total)
    need = (
        f"{sizes_text(least.layout)} and packs of {least.layout.pack_tokens:,} tokens need {memory_text(least.memory)}"
    )
    text = f"the model does not fit {hardware_text(hardware)}: {need}, but a layout may take"
    text += f" {limit_text(hardware, memory_limit(hardware))}"
    if fields and (found := _fits(model, without_sizes(spec), hardware)):
        fix = f"leave {' and '.join(fields)} out: {sizes_text(found.layout)} would fit"
        return Refusal("spec.parallelism", f"{text}; {fix}")
    return Refusal("spec.resources", f"{text}; {_nearest(model, spec, hardware)}")


def _nearest(model: ModelFacts, spec: DPOJobSpec, hardware: Hardware) -> str:
    """Say what would fit if every size is left out: more GPUs, or an adapter on the same ones."""
    free = without_sizes(spec)
    fixes = []
    for more in _larger(hardware):
        if found := _fits(model, free, more):
            fixes.append(f"{hardware_text(more)} would fit ({sizes_text(found.layout)})")
            break
    if spec.lora is None and (found := _fits(model, free.model_copy(update={"lora": Lora()}), hardware)):
        fixes.append(f"lora would fit these ({sizes_text(found.layout)})")
    if not fixes:
        return "no number of them would fit; use a smaller data.maxLength or GPUs with more memory"
    return ", and ".join(fixes)


def _fits(model: ModelFacts, spec: DPOJobSpec, hardware: Hardware) -> Candidate | None:
    limit = memory_limit(hardware)
    found = [
        Candidate(layout, memory, step_seconds(model, spec, layout, hardware))
        for layout in candidates(model, spec, hardware)
        if (memory := memory_of(model, spec, layout)).total <= limit
    ]
    return min(found, key=_rank, default=None)


def _larger(hardware: Hardware) -> Iterator[Hardware]:
    """Yield larger numbers of the same GPUs: up to eight on a node, then more nodes."""
    gpus = hardware.gpus
    while gpus * 2 <= NODE_GPUS:
        gpus *= 2
        yield replace(hardware, gpus=gpus)
    nodes = hardware.nodes
    while nodes * 2 <= NODES_MOST:
        nodes *= 2
        yield replace(hardware, nodes=nodes, gpus=gpus)


def without_sizes(spec: DPOJobSpec) -> DPOJobSpec:
    """Return the spec with every size left out that can be chosen."""
    fields = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for path in SIZES.values():
        *sections, name = path.split(".")
        place = fields
        for section in sections:
            place = place.get(section) or {}
        place.pop(name, None)
    return DPOJobSpec.model_validate(fields)
