"""The weights of NeMo's and Megatron-Core's files as Hugging Face's tensors, read by ranges.

A parameter may be stored in the parts of several tensor-parallel ranks, with queries, keys and values in one matrix and
gate and up in another. A tensor of Hugging Face's is made of boxes of the stored ones, and only those are read.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import zstandard
from torch import Tensor

from dpo_api.errors import InvalidModelError
from dpo_api.models import ModelConfig
from dpo_api.models.megatron.members import Extent
from dpo_api.models.megatron.presented import PresentedModel
from dpo_api.models.megatron.stored import Chunk, Form, Stored
from dpo_api.models.megatron.torchfiles import TENSORS, TorchFile
from dpo_api.models.megatron.torchfiles import Tensor as SavedTensor
from dpo_api.models.reader import parse_config
from dpo_store import ObjectInfo
from dpo_trainer.formats.layout import Slot, slots
from dpo_trainer.formats.safetensors_reader import DTYPES, WEIGHT_DTYPES, RangeStore

_PARALLEL_READS = 4
_BLOCK = 16 << 20


@dataclass(frozen=True, slots=True)
class Info:
    """One of Hugging Face's tensors."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Box:
    """Rows [first, last) of a stored tensor, which are rows from ``row`` and columns from ``column`` on of another."""

    part: Stored
    first: int
    last: int
    row: int
    column: int = 0


class MegatronWeights:
    """A model's tensors under Hugging Face's names."""

    def __init__(
        self, store: RangeStore, uri: str, config: ModelConfig, parameters: Mapping[str, Sequence[Stored]], plan: "Plan"
    ) -> None:
        """parameters: the stored parts of each parameter, in the order of the tensor-parallel ranks."""
        self._store, self._uri, self._config, self._parameters, self._plan = store, uri, config, parameters, plan
        self._resolved: dict[tuple[str, int], Extent] = {}
        every = slots(config, range(config.num_layers), first=True, last=True)
        self._places = {name: (slot, index) for slot in every for index, name in enumerate(slot.sources)}

    @classmethod
    def open(cls, model: PresentedModel) -> "MegatronWeights":
        """Read the tables of the files. Raises InvalidModelError."""
        config = parse_config(model.config, model.uri)
        plan = Plan(model.gamma_offset, model.separate_gate, model.legacy_qkv)
        return cls(model.files, model.uri, config, model.parameters, plan)

    @classmethod
    def known(cls, model: PresentedModel, config: ModelConfig, description: dict[str, Any]) -> "MegatronWeights":
        """Return the weights as another process has described them, without reading."""
        parameters = {name: [_stored(*part) for part in parts] for name, parts in description["parameters"].items()}
        places = {chunk.place.object.uri for parts in parameters.values() for part in parts for chunk in part.chunks}
        if not all(place.startswith(model.uri) for place in places):  # a copy of an archive that was compressed
            model.prepare()
        return cls(model.files, model.uri, config, parameters, Plan(**description["plan"]))

    @property
    def header_bytes(self) -> int:
        """Not counted: tables are small."""
        return 0

    def check(self, config: ModelConfig) -> None:
        """Raise InvalidModelError naming any parameter that is missing, unexpected, mis-shaped or not a float."""
        expected: set[str] = set()
        for slot in {slot.parameter: slot for slot, _ in self._places.values()}.values():
            for name, shapes in self._plan.stored_shapes(slot):
                expected.add(name)
                self._check_parts(name, self._parameters.get(name, ()), shapes, slot.kind)
        extra = sorted(self._parameters.keys() - expected)
        if config.tied_embeddings:
            extra = [name for name in extra if name != "output_layer.weight"]
        if extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise InvalidModelError(
                f"{self._uri}: parameter {extra[0]} is unexpected{more}; the settings and the weights disagree"
            )

    def _check_parts(self, name: str, parts: Sequence[Stored], whole: tuple[int, ...], kind: str) -> None:
        if not parts:
            raise InvalidModelError(f"{self._uri}: parameter {name} is missing; the settings and the weights disagree")
        for part in parts:
            if part.dtype not in WEIGHT_DTYPES:
                raise InvalidModelError(
                    f"{self._uri}: parameter {name} has dtype {part.dtype}; trainable weights are"
                    f" {', '.join(WEIGHT_DTYPES)}: use the original model"
                )
        if len({part.dtype for part in parts}) > 1:
            raise InvalidModelError(f"{self._uri}: the parts of parameter {name} have several dtypes; copy them again")
        each = list(whole)
        if kind != "copy":
            axis = int(kind == "columns")
            each[axis] = whole[axis] // len(parts)
        shapes = [part.shape for part in parts]
        if any(list(shape) != each for shape in shapes) or math.prod(each) * (
            1 if kind == "copy" else len(parts)
        ) != math.prod(whole):
            raise InvalidModelError(
                f"{self._uri}: parameter {name} has shape {list(shapes[0])} in {len(parts)} parts, the settings mean"
                f" {each}; the settings and the weights must come from the same model"
            )

    def info(self, name: str) -> Info:
        """Describe a tensor."""
        slot, index = self._places[name]
        kind = self._parameters[self._plan.stored_name(slot, index)][0].dtype
        return Info("F32" if self._offset(slot) else kind, slot.shapes[index])

    def read(
        self, name: str, rows: tuple[int, int] | None = None, watch: Callable[[memoryview], object] | None = None
    ) -> Tensor:
        """Read one tensor, or its rows [rows[0], rows[1]), as a CPU tensor: see ``Weights.read``."""
        slot, index = self._places[name]
        shape = slot.shapes[index]
        first, last = rows or (0, shape[0])
        parts = self._parameters[self._plan.stored_name(slot, index)]
        boxes = list(self._plan.boxes(slot, index, parts, first, last, self._config))
        found = self._joined(boxes, first, (last - first, *shape[1:]), DTYPES[parts[0].dtype])
        offset = self._offset(slot)
        if offset:  # in fp32: of bf16 close to 1 only 8 bits are left
            found = found.float() + offset
        if watch is not None:
            watch(memoryview(found.view(-1).view(torch.uint8).numpy()))
        return found

    def _joined(self, boxes: Sequence[Box], first: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the boxes' numbers as one tensor, whose first row is row ``first``."""
        if len(boxes) == 1:
            return self._read_rows(boxes[0].part, boxes[0].first, boxes[0].last)
        found = torch.empty(shape, dtype=dtype)

        def fill(box: Box) -> None:
            block = self._read_rows(box.part, box.first, box.last)
            at = found[box.row - first : box.row - first + len(block)]
            (at[:, box.column : box.column + block.shape[1]] if at.dim() > 1 else at).copy_(block)

        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            for _ in pool.map(fill, boxes):
                pass
        return found

    def _offset(self, slot: Slot) -> int:
        return self._plan.gamma_offset if slot.parameter.endswith("layernorm.weight") else 0

    def _read_rows(self, part: Stored, first: int, last: int) -> Tensor:
        """Return rows of a stored tensor, from the chunks that have them."""
        for chunk in part.chunks:
            if (
                chunk.offsets[0] <= first
                and last <= chunk.offsets[0] + chunk.shape[0]
                and chunk.shape[1:] == part.shape[1:]
            ):
                return self._numbers(chunk, part, first - chunk.offsets[0], last - first)
        found = torch.empty((last - first, *part.shape[1:]), dtype=DTYPES[part.dtype])
        filled = 0
        for chunk in part.chunks:
            low, high = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.shape[0])
            if low >= high:
                continue
            block = self._numbers(chunk, part, low - chunk.offsets[0], high - low)
            at = found[low - first : high - first]
            for axis, (offset, whole) in enumerate(zip(chunk.offsets[1:], part.shape[1:], strict=True), start=1):
                size = min(chunk.shape[axis], whole - offset)
                at, block = at.narrow(axis, offset, size), block.narrow(axis, 0, size)
            at.copy_(block)
            filled += at.numel()
        if filled != found.numel():
            raise InvalidModelError(f"{self._uri}: parts of a tensor of shape {list(part.shape)} are missing")
        return found

    def _numbers(self, chunk: Chunk, part: Stored, first: int, count: int) -> Tensor:
        """Return ``count`` rows of a chunk from ``first`` on."""
        dtype = DTYPES[part.dtype]
        row = math.prod(chunk.shape[1:])
        start, size = (chunk.skip + first * row) * dtype.itemsize, count * row * dtype.itemsize
        buffer = torch.empty(size, dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        if chunk.form in ("raw", "torch"):
            place = chunk.place if chunk.form == "raw" else self._inside(chunk.place, part.dtype)
            for at in range(0, size, _BLOCK):
                block = place.read(self._store, start + at, min(_BLOCK, size - at))
                view[at : at + len(block)] = block
        else:
            view[:] = self._decoded(chunk, dtype.itemsize)[start : start + size]
        return buffer.view(dtype).view(count, *chunk.shape[1:])

    def _inside(self, place: Extent, dtype: str) -> Extent:
        """Return where the numbers of a file of torch.save with one tensor are."""
        key = place.object.uri, place.start
        found = self._resolved.get(key)
        if found is None:
            file = TorchFile(self._store, place, place.object.uri, TENSORS)
            if not isinstance(file.value, SavedTensor) or file.value.dtype != dtype:
                raise InvalidModelError(f"{place.object.uri}: a part of it is not the tensor that its table describes")
            found = self._resolved[key] = file.place(file.value)
        return found

    def _decoded(self, chunk: Chunk, itemsize: int) -> bytes:
        size = chunk.numbers * itemsize
        packed = chunk.place.read(self._store)
        try:
            if chunk.form == "zstd":
                data = _unpacked(packed, size)
            else:
                data = zlib.decompressobj(wbits=47).decompress(packed, size + 1)
        except (zlib.error, zstandard.ZstdError) as error:
            raise InvalidModelError(f"{chunk.place.object.uri}: a chunk cannot be decompressed ({error})") from None
        if len(data) != size:
            than = "more" if len(data) > size else "fewer"
            raise InvalidModelError(
                f"{chunk.place.object.uri}: a chunk has {than} bytes than its tensor's description says"
            )
        return data

    def describe(self) -> dict[str, Any]:
        """Return what is known, of JSON's types."""
        parameters = {name: [_described(part) for part in parts] for name, parts in self._parameters.items()}
        return {"plan": asdict(self._plan), "parameters": parameters}


@dataclass(frozen=True, slots=True)
class Plan:
    """How the parameters of a file are put together."""

    gamma_offset: int = 0
    """What is added to the norms' weights."""
    separate_gate: bool = False
    """Whether gate and up are two parameters."""
    legacy_qkv: bool = False
    """Whether each part has all of its queries, then its keys, then its values."""

    def stored_name(self, slot: Slot, index: int) -> str:
        """Return the parameter that holds a slot's tensor."""
        if slot.kind == "gated" and self.separate_gate and index:
            return slot.parameter.replace("linear_fc1.", "linear_fc1_2.")
        return slot.parameter

    def stored_shapes(self, slot: Slot) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the parameters of a slot and their whole shapes."""
        if slot.kind == "gated" and self.separate_gate:
            for index, shape in enumerate(slot.shapes):
                yield self.stored_name(slot, index), shape
        else:
            yield slot.parameter, (sum(shape[0] for shape in slot.shapes), *slot.shapes[0][1:])

    def boxes(
        self, slot: Slot, index: int, parts: Sequence[Stored], first: int, last: int, config: ModelConfig
    ) -> Iterator[Box]:
        """Yield the boxes that rows [first, last) of a slot's tensor are made of."""
        if slot.kind == "copy":
            yield Box(parts[0], first, last, first)
        elif slot.kind == "columns":
            for number, part in enumerate(parts):
                yield Box(part, first, last, first, number * part.shape[1])
        elif slot.kind == "qkv" and not self.legacy_qkv:
            for row, fused, count in _runs(index, first, last, config):
                yield from _cut(parts, 0, parts[0].shape[0], row, fused, count)
        elif slot.kind == "rows" or (slot.kind == "gated" and self.separate_gate):
            yield from _cut(parts, 0, parts[0].shape[0], first, first, last - first)
        else:  # each part holds its rows of every source, one source after the other
            each = [shape[0] // len(parts) for shape in slot.shapes]
            yield from _cut(parts, sum(each[:index]), each[index], first, first, last - first)


def _runs(source: int, first: int, last: int, config: ModelConfig) -> Iterator[tuple[int, int, int]]:
    """Yield (row of q, k or v; row of the fused matrix; number of rows) for rows [first, last) of a source."""
    n, d = config.num_attention_heads // config.num_query_groups, config.head_dim
    count, before = (n * d, 0) if source == 0 else (d, (n + source - 1) * d)
    row = first
    while row < last:
        group, within = divmod(row, count)
        length = min(count - within, last - row)
        yield row, group * (n + 2) * d + before + within, length
        row += length


def _cut(parts: Sequence[Stored], begin: int, each: int, row: int, whole: int, count: int) -> Iterator[Box]:
    """Yield the boxes of ``count`` rows from ``whole`` on, of ``each`` rows of each part from its row ``begin`` on."""
    while count:
        number, within = divmod(whole, each)
        length = min(each - within, count)
        yield Box(parts[number], begin + within, begin + within + length, row)
        row, whole, count = row + length, whole + length, count - length


def _unpacked(packed: bytes, size: int) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
        return reader.read(size + 1)


def _described(part: Stored) -> list[Any]:
    return [part.dtype, list(part.shape), [_described_chunk(chunk) for chunk in part.chunks]]


def _described_chunk(chunk: Chunk) -> list[Any]:
    place = chunk.place
    of_place = [place.object.uri, place.object.size, place.object.etag, place.start, place.size]
    return [list(chunk.offsets), list(chunk.shape), *of_place, chunk.form, chunk.skip, chunk.numbers]


def _stored(dtype: str, shape: list[int], chunks: list[list[Any]]) -> Stored:
    return Stored(dtype, tuple(shape), tuple(_chunk(*chunk) for chunk in chunks))


def _chunk(
    offsets: list[int],
    shape: list[int],
    uri: str,
    size: int,
    etag: str,
    start: int,
    length: int,
    form: Form,
    skip: int,
    numbers: int,
) -> Chunk:
    place = Extent(ObjectInfo(uri, size, etag), start, length)
    return Chunk(tuple(offsets), tuple(shape), place, form, skip, numbers)
