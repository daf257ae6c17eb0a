"""Writing a Hugging Face model folder that transformers loads."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.errors import NotFoundError
from dpo_api.models import ModelConfig
from dpo_api.models.folder import INDEX, SINGLE, read_json
from dpo_store import join_uri
from dpo_store.errors import from_os_error
from dpo_trainer import bridge
from dpo_trainer.formats.huggingface import Checkpoint, slots_by_stage, stage_slots
from dpo_trainer.formats.layout import Slot, Value, dissolve, target, whole
from dpo_trainer.formats.safetensors_reader import DTYPES, RangeStore, bytes_of, header_of
from dpo_trainer.model.forward import unwrap

# Copied byte for byte: a newer transformers would rewrite them into forms that older ones cannot read.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
MAX_SHARD_BYTES = 5 * 10**9


def export(
    model: Any,
    store: RangeStore,
    source: str,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | None = None,
    value_of: Value | None = None,
) -> list[str]:
    """Write the model as a Hugging Face folder; return the names of the files, weights last.

    source: the folder that the model was loaded from: its config, tokenizer and chat template are copied byte for byte
    (config.json changes its dtype only). dtype: of the written weights; None means each tensor's own in the source.
    tokenizer: a folder to take the tokenizer's files from instead. value_of: see ``Value``; identity by default.
    A collective of the first data-parallel rank's model: the first tensor-parallel rank of each stage writes that
    stage's files, and that of the first stage everything else. Weights are written one at a time, so
    the memory is that of the largest parameter. Raises NoSpaceError when the disk is full, AccessDeniedError and
    so on for other failures of writing.
    """
    gpt = unwrap(model)
    config: ModelConfig = gpt.dpo_config
    here = parallel_state.get_pipeline_model_parallel_rank()
    files = plan_files(config, store, source, dtype=dtype, max_shard_bytes=max_shard_bytes)
    weights = tensors_of(gpt, exported(stage_slots(gpt)), value_of or (lambda _name, parameter: parameter))
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        for _ in weights:  # take part in the gathering
            pass
        return []
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        written: list[str] = []
        if here == 0:
            written += ["config.json", *copy_companions(store, source, out_dir, tokenizer)]
            write_config(store, source, out_dir, config, dtype)
        for file in files:
            if file.stage == here:
                write_tensors(out_dir / file.name, file.tensors, weights)
                written.append(file.name)
        if here == 0 and len(files) > 1:
            write_index(out_dir, files)
            written.append(INDEX)
    except OSError as error:
        raise from_os_error(error, str(out_dir)) from error
    return written


def tensors_of(gpt: Any, stage: Sequence[Slot], value_of: Value) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors of this pipeline stage, whole, in the model's order. A collective over tensor ranks."""
    for slot in stage:
        yield from zip(slot.sources, _dissolved(gpt, slot, value_of), strict=True)


@torch.no_grad()
def _dissolved(gpt: Any, slot: Slot, value_of: Value) -> tuple[Tensor, ...]:
    size = parallel_state.get_tensor_model_parallel_world_size()
    part = value_of(slot.parameter, target(gpt, slot)).detach()
    parts = [part]
    if size > 1 and slot.kind != "copy":
        part = part.to(bridge.device())
        parts = [torch.empty_like(part) for _ in range(size)]
        dist.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return dissolve(slot, whole(slot.kind, parts), gpt.dpo_config)


Planned = tuple[str, tuple[int, ...], torch.dtype]


def plan_shards(plan: Sequence[Planned], limit: int) -> list[list[Planned]]:
    """Cut tensors (name, shape, dtype) into files of at most ``limit`` bytes; a larger tensor gets its own."""
    shards: list[list[Planned]] = [[]]
    used = 0
    for entry in plan:
        size = torch.Size(entry[1]).numel() * entry[2].itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return shards


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of weights, and the pipeline stage that writes it."""

    name: str
    stage: int
    tensors: list[Planned]


def plan_files(
    config: ModelConfig, store: RangeStore, source: str, *, dtype: torch.dtype | None, max_shard_bytes: int
) -> list[PlannedFile]:
    """Return the files of the whole model, the same on every rank, in the model's order."""
    dtype_of = _dtype_of(store, source, dtype)
    shards: list[tuple[int, list[Planned]]] = []
    for stage, held in enumerate(slots_by_stage(config)):
        plan = [(n, s, dtype_of(n)) for slot in exported(held) for n, s in zip(slot.sources, slot.shapes, strict=True)]
        shards += [(stage, shard) for shard in plan_shards(plan, max_shard_bytes)]
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [PlannedFile(name, stage, shard) for name, (stage, shard) in zip(names, shards, strict=True)]


def exported(held: Sequence[Slot]) -> list[Slot]:
    """Return the slots of a stage that it exports: those that no other stage has."""
    return [slot for slot in held if not slot.duplicate]


def write_index(out_dir: Path, files: Sequence[PlannedFile]) -> None:
    """Write the index that says which file holds each tensor."""
    total = sum(torch.Size(shape).numel() * dtype.itemsize for file in files for _, shape, dtype in file.tensors)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {entry[0]: file.name for file in files for entry in file.tensors},
    }
    (out_dir / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(path: Path, plan: Sequence[Planned], tensors: Iterator[tuple[str, Tensor]]) -> int:
    """Write one safetensors file from the next ``len(plan)`` tensors of a stream; return the bytes of its tensors."""
    total = 0
    with path.open("wb") as file:
        file.write(header_of(list(plan), {"format": "pt"}))
        for (planned, shape, dtype), (given, tensor) in zip(plan, tensors, strict=False):
            if planned != given or shape != tuple(tensor.shape):
                raise RuntimeError(f"export planned {planned} {shape} and was given {given} {tuple(tensor.shape)}")
            for block in bytes_of(tensor.to(dtype)):
                file.write(block)
                total += len(block)
    return total


def copy_companions(store: RangeStore, source: str, out_dir: Path, tokenizer: str | None) -> list[str]:
    """Copy the files that are neither weights nor config; return the names of those that exist."""
    copied: list[str] = []
    for folder, names in ((tokenizer or source, TOKENIZER_FILES), (source, OTHER_FILES)):
        for name in names:
            try:
                data = store.read(join_uri(folder, name))
            except NotFoundError:
                continue
            (out_dir / name).write_bytes(data)
            copied.append(name)
    return copied


def write_config(store: RangeStore, source: str, out_dir: Path, config: ModelConfig, dtype: torch.dtype | None) -> None:
    """Write config.json: the source's bytes, unless the dtype changes.

    A rewritten file carries the rope settings under the keys of transformers < 5 and ≥ 5.
    """
    uri = join_uri(source, "config.json")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is None or name == config.dtype:
        (out_dir / "config.json").write_bytes(store.read(uri))
        return
    raw = read_json(store, uri)
    for key in ("dtype", "torch_dtype"):
        raw[key] = name
    raw["rope_theta"] = config.rope_theta
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.pop("rope_theta", None)
    raw["rope_scaling"] = {"rope_type": kind, **rope} if config.rope_scaling else None
    raw["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": kind, **rope}
    (out_dir / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _dtype_of(store: RangeStore, source: str, dtype: torch.dtype | None) -> Callable[[str], torch.dtype]:
    if dtype is not None:
        return lambda _name: dtype
    checkpoint = Checkpoint.open(store, source)
    return lambda name: DTYPES[checkpoint.file_of(name).tensors[name].dtype]
