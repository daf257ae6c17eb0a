"""Reading safetensors by ranges from any store: headers checked, one tensor (or a slice of its rows) at a time.

Format: u64 little-endian N, N bytes of JSON, then the tensors' bytes, packed in C order without holes. A tensor's
``data_offsets`` count from the byte after the JSON.
"""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from dpo_api.errors import InvalidModelError
from dpo_store import ObjectInfo

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
# Weights of other types (float8, packed 4-bit, …) are quantised: they have no exact float value of their own.
WEIGHT_DTYPES = ("F32", "F16", "BF16")

_HEADER_LIMIT = 100_000_000  # the format's own
_BLOCK = 16 << 20
_PARALLEL_READS = 4


class RangeStore(Protocol):
    """The part of dpo_store.Store that reading needs."""

    def stat(self, uri: str) -> Any:
        """Describe one object; NotFoundError if it is absent."""

    def read(self, source: Any, start: int = ..., length: int | None = ...) -> bytes:
        """Return ``length`` bytes from ``start``."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; ``start`` and ``end`` are offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


Description = tuple[int, str, int, dict[str, tuple[str, list[int], int, int]]]
"""A file's size and ETag, the bytes of its header, and its tensors: dtype, shape, start, end."""


class SafetensorsFile:
    """One file with its header read and checked. Reading fails if the object has changed since (its ETag is compared).

    Raises InvalidModelError naming the file for a header that is damaged or disagrees with the file's size.
    Memory: the header, the tensor asked for, and at most 4 blocks of 16 MiB in flight.
    """

    def __init__(self, store: RangeStore, uri: str, known: Description | None = None) -> None:
        """Read the header, unless it is ``known``: what ``describe`` has returned in another process."""
        self.store = store
        self.uri = uri
        if known is not None:
            size, etag, self.header_bytes, entries = known
            self._object = ObjectInfo(uri, size, etag)
            self.tensors = {
                name: TensorInfo(dtype, tuple(shape), start, end)
                for name, (dtype, shape, start, end) in entries.items()
            }
            return
        self._object = store.stat(uri)
        header = self._read_header()
        self.header_bytes = 8 + len(header)
        self.tensors = self._check(header)

    def describe(self) -> Description:
        """Return what the header says, of JSON's types."""
        entries = {name: (info.dtype, list(info.shape), info.start, info.end) for name, info in self.tensors.items()}
        return self.size, self._object.etag, self.header_bytes, entries

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._object.size

    def _fail(self, why: str) -> InvalidModelError:
        return InvalidModelError(f"{self.uri}: not a usable safetensors file: {why}; copy or download it again")

    def _read_header(self) -> bytes:
        # Two reads, so that every byte of a model is read once.
        first = self.store.read(self._object, 0, min(self.size, 8)) if self.size else b""
        if len(first) < 8:
            raise self._fail(f"it holds {self.size} bytes")
        length = int.from_bytes(first[:8], "little")
        if length > _HEADER_LIMIT:
            raise self._fail(f"its first 8 bytes give a header of {length:,} bytes, the limit is {_HEADER_LIMIT:,}")
        if 8 + length > self.size:
            raise self._fail(
                f"it is truncated: its header alone takes {8 + length:,} bytes, the file has {self.size:,}"
            )
        return self.store.read(self._object, 8, length) if length else b""

    def _check(self, header: bytes) -> dict[str, TensorInfo]:
        try:
            entries = json.loads(header)
        except ValueError as error:
            raise self._fail(f"its header is not JSON ({error})") from None
        if not isinstance(entries, dict):
            raise self._fail("its header is not a JSON object")
        entries.pop("__metadata__", None)
        base = 8 + len(header)
        tensors = {name: self._entry(name, entry, base) for name, entry in entries.items()}
        cursor = base
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if info.start != cursor:
                what = "overlaps the tensor before it" if info.start < cursor else "leaves a hole before it"
                raise self._fail(f"tensor {name} {what} (offset {info.start - base:,}, expected {cursor - base:,})")
            cursor = info.end
        if cursor > self.size:
            raise self._fail(f"it is truncated: its header describes {cursor:,} bytes, the file has {self.size:,}")
        if cursor < self.size:
            raise self._fail(f"{self.size - cursor:,} bytes follow the last tensor")
        return tensors

    def _entry(self, name: str, entry: object, base: int) -> TensorInfo:
        if not isinstance(entry, dict):
            raise self._fail(f"the entry of tensor {name} is not an object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
            raise self._fail(f"tensor {name} has shape {shape} and data_offsets {offsets}")
        if not isinstance(dtype, str):
            raise self._fail(f"tensor {name} has dtype {dtype}")
        if dtype in DTYPES and offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            raise self._fail(f"tensor {name} of shape {shape} and dtype {dtype} takes {offsets[1] - offsets[0]} bytes")
        return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])

    def read(
        self, name: str, rows: tuple[int, int] | None = None, watch: Callable[[memoryview], object] | None = None
    ) -> Tensor:
        """Read one tensor, or its rows [rows[0], rows[1]) along the first axis, as a CPU tensor of the file's dtype.

        ``watch`` receives the bytes (it may hash them).
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise self._fail(f"tensor {name} has dtype {info.dtype}, which is not supported")
        dtype = DTYPES[info.dtype]
        shape, start, end = info.shape, info.start, info.end
        if rows is not None:
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            start, end = start + rows[0] * row_bytes, start + rows[1] * row_bytes
            shape = (rows[1] - rows[0], *shape[1:])
        buffer = torch.empty(end - start, dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        self._fill(view, start)
        if watch is not None:
            watch(view)
        return buffer.view(dtype).view(shape)

    def _fill(self, view: memoryview, start: int) -> None:
        """Read len(view) bytes from ``start`` of the file, large ranges in parallel blocks."""

        def fetch(offset: int) -> None:
            length = min(_BLOCK, len(view) - offset)
            block = self.store.read(self._object, start + offset, length)
            if len(block) != length:
                raise self._fail(f"it ended {length - len(block):,} bytes early while being read")
            view[offset : offset + length] = block

        offsets = range(0, len(view), _BLOCK)
        if len(offsets) <= 1:
            for offset in offsets:
                fetch(offset)
            return
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            for _ in pool.map(fetch, offsets):
                pass


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def header_of(tensors: list[tuple[str, tuple[int, ...], torch.dtype]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a file that will hold ``tensors`` (name, shape, dtype), in that order, up to their data."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    cursor = 0
    for name, shape, dtype in tensors:
        end = cursor + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [cursor, end]}
        cursor = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data starts at a multiple of 8
    return len(header).to_bytes(8, "little") + header


def bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in C order, in blocks of at most 16 MiB."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    for offset in range(0, flat.shape[0], _BLOCK):
        yield memoryview(flat[offset : offset + _BLOCK])
