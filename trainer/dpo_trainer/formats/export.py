"""Writing a Hugging Face model folder that transformers loads."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.errors import DPOError, InternalError, NotFoundError
from dpo_api.models import ModelConfig
from dpo_api.models.folder import INDEX, OWN_TOKENIZER, SINGLE, read_json
from dpo_store import Store, join_uri, open_store
from dpo_trainer import bridge, messages
from dpo_trainer.formats.huggingface import open_weights, slots_by_stage, stage_slots
from dpo_trainer.formats.layout import Slot, Value, dissolve, target, whole
from dpo_trainer.formats.safetensors_reader import DTYPES, NAMES, RangeStore, bytes_of, header_of
from dpo_trainer.model.forward import unwrap

log = logging.getLogger(__name__)

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
OUTPUT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types that a model can be written in, by the names that users give them."""


Collect = Callable[[Tensor, int], Tensor | None]
"""(parameter, data-parallel rank) → its value on that rank and None on the others: ``Masters.whole``."""


def export(
    model: Any,
    store: RangeStore,
    source: str,
    out: str | Path,
    *,
    target_store: Store | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | None = None,
    collect: Collect | None = None,
    value_of: Value | None = None,
) -> list[str]:
    """Write the model as a Hugging Face folder; return the names of the files, weights last.

    source: the folder that the model was loaded from: its config, tokenizer and chat template are copied byte for byte
    (config.json changes its dtype only). out: a folder's address. target_store: to write with. dtype: of the written
    weights; None means each tensor's own in the source. tokenizer: a folder to take the tokenizer's files from instead.
    collect, value_of: where the values come from, one of them; the parameters by default.

    A collective of all ranks. The files of a pipeline stage are dealt over its ranks, which write them at the same
    time; rank 0 writes everything else, the index last. Each parameter is gathered by the rank that writes it, so the
    memory is that of a few parameters. Raises NoSpaceError when the disk is full, AccessDeniedError and so on for other
    failures of writing, on every rank.
    """
    gpt = unwrap(model)
    config: ModelConfig = gpt.dpo_config
    to = target_store or open_store()
    address = str(out).rstrip("/")
    plan = plan_files(
        config,
        messages.agreed(lambda: {name: NAMES[kind] for name, kind in _dtypes(config, store, source, dtype).items()}),
        max_shard_bytes,
    )

    def beside() -> list[str]:
        copied = copy_companions(store, source, to, address, tokenizer)
        write_config(store, source, to, address, config, dtype)
        return ["config.json", *copied]

    def index() -> list[str]:
        if len(plan) == 1:
            return []
        to.write(join_uri(address, INDEX), index_of(plan))
        return [INDEX]

    written = messages.agreed(beside)
    error = _Writing(gpt, plan, to, address, collect, value_of).run()
    for words in messages.from_all(None if error is None else messages.words_of(error)):
        if words is not None:
            raise error or messages.error_of(words)
    return [*written, *(file.name for file in plan), *messages.agreed(index)]


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
    """One file of weights, and who writes it."""

    name: str
    stage: int  #: pipeline stage
    writer: int  #: which of the stage's ranks
    tensors: list[Planned]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in self.tensors)


def plan_files(config: ModelConfig, dtypes: Mapping[str, str], max_shard_bytes: int) -> list[PlannedFile]:
    """Return the files of the whole model, the same on every rank, in the model's order."""
    found: list[tuple[int, int, list[Planned]]] = []
    ranks = len(stage_ranks())
    for stage, held in enumerate(slots_by_stage(config)):
        plan = [
            (name, shape, DTYPES[dtypes[name]])
            for slot in exported(held)
            for name, shape in zip(slot.sources, slot.shapes, strict=True)
        ]
        found += [(stage, place % ranks, shard) for place, shard in enumerate(plan_shards(plan, max_shard_bytes))]
    return [PlannedFile(name, *file) for name, file in zip(file_names(len(found)), found, strict=True)]


def file_names(count: int) -> list[str]:
    """Return the names of a folder's files of weights, in their order."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def stage_ranks() -> list[int]:
    """Return the ranks of this rank's pipeline stage: the tensor-parallel ranks of the first data rank, and so on."""
    group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return dist.get_process_group_ranks(group)


class _Writing:
    """This stage's part of writing the weights."""

    def __init__(
        self,
        gpt: Any,
        plan: Sequence[PlannedFile],
        store: Store,
        address: str,
        collect: Collect | None,
        value_of: Value | None,
    ) -> None:
        self._gpt, self._store, self._address = gpt, store, address
        self._collect, self._value_of = collect, value_of
        here = parallel_state.get_pipeline_model_parallel_rank()
        self._files = [file for file in plan if file.stage == here]
        self._slot_of = {name: slot for slot in exported(stage_slots(gpt)) for name in slot.sources}
        self._ranks = stage_ranks()
        self._size = parallel_state.get_tensor_model_parallel_world_size()

    def run(self) -> DPOError | None:
        """Write the files, as many at a time as the stage has ranks; return what kept this rank from writing its own.

        It takes part in the gathering to the end, so that no rank waits for it.
        """
        error: DPOError | None = None
        for first in range(0, len(self._files), len(self._ranks)):
            together = self._files[first : first + len(self._ranks)]
            mine = next((file for file in together if self._ranks[file.writer] == dist.get_rank()), None)
            with _FileWriter(self._store, self._address, mine) as writer:
                for file, slot, names in _turns(together, self._slot_of):
                    dtypes = {dtype for name, _, dtype in file.tensors if name in names}
                    tensors = self._gathered(slot, file.writer, dtypes.pop() if len(dtypes) == 1 else None)
                    if tensors is not None:
                        for name in names:
                            writer.put(tensors[name])
            error = error or writer.error
        return error

    @torch.no_grad()
    def _gathered(self, slot: Slot, writer: int, dtype: torch.dtype | None) -> dict[str, Tensor] | None:
        """Return the slot's tensors on the rank that writes them, None on the stage's other ranks. A collective.

        dtype: of all of them in the file, in which the parts are sent; None if they differ.
        """
        data, tensor = divmod(writer, self._size)
        mine = parallel_state.get_data_parallel_rank(with_context_parallel=True) == data
        parameter = target(self._gpt, slot)
        part = parameter if self._collect is None else self._collect(parameter, data)
        if not mine or part is None:
            return None
        if self._value_of is not None:
            part = self._value_of(slot.parameter, part)
        parts = _parts_on(tensor, slot, part.detach().to(dtype or part.dtype), self._size)
        if parts is None:
            return None
        return dict(zip(slot.sources, dissolve(slot, whole(slot.kind, parts), self._gpt.dpo_config), strict=True))


def _parts_on(rank: int, slot: Slot, part: Tensor, size: int) -> list[Tensor] | None:
    """Return the tensor-parallel ranks' parts on one of them, None on the others."""
    here = parallel_state.get_tensor_model_parallel_rank()
    if size == 1 or slot.kind == "copy":
        return [part] if here == rank else None
    part = part.to(bridge.device()).contiguous()
    group: Any = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(size)] if here == rank else None
    dist.gather(part, parts, dst=dist.get_global_rank(group, rank), group=group)
    return parts


def _turns(files: Sequence[PlannedFile], slot_of: Mapping[str, Slot]) -> Iterator[tuple[PlannedFile, Slot, list[str]]]:
    """Yield which tensors of which file come next: one parameter's at a time, the files in turn."""
    of_file = []
    for file in files:
        names = [name for name, _, _ in file.tensors]
        of_file.append([(file, slot, list(part)) for slot, part in groupby(names, lambda name: slot_of[name])])
    for together in zip_longest(*of_file):
        yield from (turn for turn in together if turn is not None)


class _FileWriter:
    """Writes one file in a thread, while the next tensor is gathered. With no file it does nothing."""

    def __init__(self, store: Store, address: str, file: PlannedFile | None) -> None:
        self.error: DPOError | None = None
        self._store, self._address, self._file = store, address, file
        self._ended = False
        self._next: Queue[Tensor | None] = Queue(1)
        self._thread = Thread(target=self._write, name="dpo-export", daemon=True)

    def put(self, tensor: Tensor) -> None:
        """Give the file its next tensor; waits while the one before it is being written."""
        self._next.put(tensor)

    def __enter__(self) -> Self:
        if self._file is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is not None:
            self._next.put(None)
            self._thread.join()

    def _write(self) -> None:
        file = self._file
        if file is None:
            return
        try:
            write_tensors(self._store, join_uri(self._address, file.name), file.tensors, self._given())
        except DPOError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - every rank has to learn of it
            self.error = InternalError(f"{file.name}: {type(error).__name__}: {error}")
        for _ in self._given():  # so that the other side never waits
            pass

    def _given(self) -> Iterator[Tensor]:
        while not self._ended:
            tensor = self._next.get()
            if tensor is None:
                self._ended = True
                return
            yield tensor


def exported(held: Sequence[Slot]) -> list[Slot]:
    """Return the slots of a stage that it exports: those that no other stage has."""
    return [slot for slot in held if not slot.duplicate]


def index_of(files: Sequence[PlannedFile]) -> bytes:
    """Return the index, which says which file holds each tensor."""
    index = {
        "metadata": {"total_size": sum(file.size for file in files)},
        "weight_map": {entry[0]: file.name for file in files for entry in file.tensors},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def write_tensors(store: Store, uri: str, plan: Sequence[Planned], tensors: Iterator[Tensor]) -> None:
    """Write one safetensors file from a stream of its tensors, which may be of another float type."""
    header = header_of(list(plan), {"format": "pt"})

    def blocks() -> Iterator[bytes | memoryview]:
        yield header
        for name, shape, dtype in plan:
            tensor = next(tensors, None)
            if tensor is None or shape != tuple(tensor.shape):
                raise RuntimeError(
                    f"export planned {name} {shape} and was given {tensor if tensor is None else tensor.shape}"
                )
            yield from bytes_of(tensor.to(dtype))

    size = sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in plan)
    store.write_blocks(uri, blocks(), len(header) + size)


def copy_companions(store: RangeStore, source: str, target_store: Store, out: str, tokenizer: str | None) -> list[str]:
    """Copy the files that are neither weights nor config; return the names of those that exist.

    A tokenizer.model that is the only file of the tokenizer gets a tokenizer.json beside it.
    """
    copied: list[str] = []
    bare: bytes | None = None
    for folder, names in ((tokenizer or source, TOKENIZER_FILES), (source, OTHER_FILES)):
        for name in names:
            try:
                data = store.read(join_uri(folder, name))
            except NotFoundError:
                continue
            target_store.write(join_uri(out, name), data)
            copied.append(name)
            if name == "tokenizer.model":
                bare = data
    if bare is not None and not {"tokenizer.json", "tokenizer_config.json"}.intersection(copied):
        family = str(read_json(store, join_uri(source, "config.json")).get("model_type"))
        for name, data in _as_json(bare, family).items():
            if name not in copied:
                target_store.write(join_uri(out, name), data)
                copied.append(name)
    return copied


def _as_json(model: bytes, family: str) -> dict[str, bytes]:
    """Return the files with which transformers reads the tokens of a tokenizer.model; {} if nothing makes it."""
    from dpo_trainer.formats.sentencepiece_json import tokenizer_files  # imports tokenizers
    from dpo_trainer.formats.sentencepiece_normal import InexactError

    why: object = f"transformers reads every tokenizer of the family {family} as the family's own"
    if family not in OWN_TOKENIZER:
        try:
            return tokenizer_files(model)
        except InexactError as error:
            why = error
    log.warning("no tokenizer.json is written, and only SentencePiece itself reads tokenizer.model: %s", why)
    return {}


def write_config(
    store: RangeStore, source: str, target_store: Store, out: str, config: ModelConfig, dtype: torch.dtype | None
) -> None:
    """Write config.json: the source's bytes, unless the dtype changes.

    A rewritten file carries the rope settings under the keys of transformers < 5 and ≥ 5.
    """
    uri = join_uri(source, "config.json")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is None or name == config.dtype:
        target_store.write(join_uri(out, "config.json"), store.read(uri))
        return
    raw = read_json(store, uri)
    for key in ("dtype", "torch_dtype"):
        raw[key] = name
    raw |= _local_rope(raw, config) if config.row.local_rope else _rope(raw, config)
    target_store.write(join_uri(out, "config.json"), (json.dumps(raw, indent=2) + "\n").encode())


def _rope(raw: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return the rope settings under the keys of transformers < 5 and ≥ 5."""
    found: dict[str, Any] = {"rope_theta": config.rope_theta}
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.pop("rope_theta", None)
    if "partial_rotary_factor" in rope:  # beside both, as transformers reads rope_scaling before rope_parameters
        found["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    found["rope_scaling"] = {"rope_type": kind, **rope} if config.rope_scaling else None
    found["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": kind, **rope}
    return found


def _local_rope(raw: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The same where windowed layers have a base of their own."""
    nested = raw.get("rope_parameters") or {}
    others = dict(nested.get("full_attention") or raw.get("rope_scaling") or {})
    others |= {"rope_type": others.pop("type", others.get("rope_type", "default")), "rope_theta": config.rope_theta}
    scaling = {key: value for key, value in others.items() if key != "rope_theta"}
    found: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": scaling if config.rope_scaling else None}
    local = config.local_rope_theta
    if local is None:  # no layer has a window
        return found | {"rope_parameters": {**nested, "full_attention": others}}
    sliding = {"rope_type": "default", "rope_theta": local}
    parameters = {"full_attention": others, "sliding_attention": sliding}
    return found | {"rope_local_base_freq": local, "rope_parameters": parameters}


def _dtypes(config: ModelConfig, store: RangeStore, source: str, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the type to write each tensor in."""
    names = [name for held in slots_by_stage(config) for slot in exported(held) for name in slot.sources]
    if dtype is not None:
        return dict.fromkeys(names, dtype)
    weights = open_weights(store, source)
    return {name: DTYPES[weights.info(name).dtype] for name in names}
