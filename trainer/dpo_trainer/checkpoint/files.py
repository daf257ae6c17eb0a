"""Writes and reads boxes in the form of torch's distributed checkpoints: a file for each rank, and a table of contents.

The ranks exchange no pickles: each says as JSON what it has written, and rank 0 makes the table from that.
"""

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dpo_trainer.checkpoint.boxes import Box

Written = list[Any]
"""One written box as JSON: key, whole shape, offsets, sizes, file, first byte, bytes."""

Part = tuple[str, int, int]
"""A part of a file: its name, the first byte and the number of bytes."""

Fetch = Callable[[str, int, int], bytes]
"""Reads a ``Part``."""

ValuesOf = Callable[[int], Tensor]
"""The number of a box → its values, as they are to be written. They may change at the next call."""

_FORMAT_1 = {
    "master.": ("optimizer.state.param.", "optimizer.state.fp32_param.", ""),
    "exp_avg.": ("optimizer.state.exp_avg.",),
    "exp_avg_sq.": ("optimizer.state.exp_avg_sq.",),
}
"""Beginning of a key → those that format 1 has in its place. Which one depends on the optimizer and the precision."""


class _Source(DefaultSavePlanner):
    """Gives torch's writer the boxes' values."""

    def __init__(self, boxes: Sequence[Box], values_of: ValuesOf) -> None:
        super().__init__()
        self._places = {_index(box): place for place, box in enumerate(boxes)}
        self._values_of = values_of

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values of one box."""
        values = self._values_of(self._places[write_item.index])
        # As a storage of its own: torch's writer copies a part of a larger one, and keeps the copies of all boxes until
        # the file is complete.
        return torch.from_numpy(values.numpy()) if values.device.type == "cpu" else values


class _Target(DefaultLoadPlanner):
    """Gives torch's reader the places to copy to."""

    def __init__(self, places: dict[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._places = places

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the view of a box that one read fills."""
        found = self._places[read_item.dest_index]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(axis, start, length)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: ``tensor`` is a view of the box."""


def write(folder: Path, rank: int, boxes: Sequence[Box], values_of: ValuesOf | None = None) -> list[Written]:
    """Write this rank's boxes into one file of a local folder; return what the table of contents needs.

    values_of: their values, asked for once each when they are written, if not those of the boxes.
    """
    if not boxes:
        return []
    items = [
        WriteItem(
            _index(box),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(_chunk(box), TensorProperties(box.values.dtype), Size(box.whole)),
        )
        for box in boxes
    ]
    plan = SavePlan(items, storage_data=_StoragePrefix(f"__{rank}_"))
    source = _Source(boxes, values_of or (lambda place: boxes[place].values))
    # 0: one box at a time. torch's other loader, for GPUs, holds a pinned copy of each until the end, and asks for
    # values ahead.
    results = FileSystemWriter(folder, per_thread_copy_ahead=0).write_data(plan, source).value()
    places = {result.index: result.storage_data for result in results}
    written: list[Written] = []
    for box in boxes:
        place = places[_index(box)]
        size = list(box.values.shape)
        written.append(
            [box.key, list(box.whole), list(box.offsets), size, place.relative_path, place.offset, place.length]
        )
    return written


def table(
    written: Sequence[Written],
    dtypes: Mapping[str, torch.dtype] | None = None,
    objects: Mapping[str, Part] | None = None,
) -> bytes:
    """Return the table of contents of all ranks' boxes.

    dtypes: of the tensors that are not fp32, by key. objects: what else is in the files, by key.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, whole, offsets, sizes, file, first, length in written:
        dtype = (dtypes or {}).get(key, torch.float32)
        found = tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype), Size(whole), []))
        found.chunks.append(ChunkStorageMetadata(Size(offsets), Size(sizes)))
        places[MetadataIndex(key, Size(offsets))] = _StorageInfo(file, first, length)
    others = {key: BytesStorageMetadata() for key in objects or {}}
    places |= {MetadataIndex(key): _StorageInfo(*part) for key, part in (objects or {}).items()}
    return pickle.dumps(Metadata({**tensors, **others}, storage_data=places))


class Reading:
    """The parts of a checkpoint's files that some boxes are in."""

    def __init__(self, folder: Path, boxes: Sequence[Box], version: int) -> None:
        """Read the folder's table of contents, which has been checked (``check_metadata``). version: of the format.

        Raises ValueError if the checkpoint lacks a value or has a tensor of another shape.
        """
        self._metadata = FileSystemReader(folder).read_metadata()
        own: dict[str, list[Box]] = {}
        for box in boxes:
            own.setdefault(box.key, []).append(box)
        items: list[ReadItem] = []
        places: dict[MetadataIndex, Tensor] = {}
        for key, wanted in own.items():
            name = key if version > 1 else _name_in_format_1(key, self._metadata)
            saved = self._metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise ValueError(f"it has no tensor {name}")  # noqa: TRY004 - about the file, not an argument
            _check_shape(name, tuple(saved.size), wanted[0].whole, version)
            found = create_read_items_for_chunk_list(name, saved, [_chunk(box) for box in wanted])
            count = sum(item.lengths.numel() for item in found)
            if count != sum(box.values.numel() for box in wanted):
                raise ValueError(f"parts of tensor {name} are missing")
            items += found
            places |= {MetadataIndex(name, Size(box.offsets)): box.values for box in wanted}
        self._items = sorted(items, key=lambda item: self._part(item.storage_index))
        self._places = places

    def _part(self, index: MetadataIndex) -> Part:
        found = self._metadata.storage_data[index]
        return found.relative_path, found.offset, found.length

    @property
    def bytes(self) -> int:
        """Bytes of these parts."""
        return sum(length for _, _, length in {self._part(item.storage_index) for item in self._items})

    @property
    def bytes_of_all(self) -> int:
        """Bytes of all parts of the checkpoint."""
        return sum(length for _, _, length in {self._part(index) for index in self._metadata.storage_data})

    def from_folder(self, folder: Path) -> None:
        """Fill the boxes from the files in a local folder."""
        self._fill(FileSystemReader(folder))

    def from_ranges(self, fetch: Fetch) -> None:
        """Fill the boxes from parts of files. Memory: twice the largest part."""
        self._fill(_RangeReader(fetch))

    def _fill(self, reader: FileSystemReader) -> None:
        reader.set_up_storage_reader(self._metadata, is_coordinator=False)
        reader.read_data(LoadPlan(self._items), _Target(self._places))


class _Names(FileSystem):
    """Opens nothing: a file is its name."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:  # noqa: ARG002 - of the class
        """Yield the file's name."""
        yield path.name


class _RangeReader(FileSystemReader):
    """Reads each part by ``fetch``; once if the items that need it follow each other."""

    def __init__(self, fetch: Fetch) -> None:
        super().__init__("")
        self.fs = _Names()
        self._fetch = fetch
        self._last: tuple[Part, bytes] | None = None

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        part = (str(file), sinfo.offset, sinfo.length)
        if self._last is None or self._last[0] != part:
            self._last = None
            self._last = part, self._fetch(*part)
        return io.BytesIO(self._last[1])


def _name_in_format_1(key: str, metadata: Metadata) -> str:
    start = next(start for start in _FORMAT_1 if key.startswith(start))
    names = [other + key.removeprefix(start) for other in _FORMAT_1[start]]
    return next((name for name in names if name in metadata.state_dict_metadata), names[0])


def _check_shape(name: str, saved: tuple[int, ...], wanted: tuple[int, ...], version: int) -> None:
    """Format 1 has the rows that tensor parallelism pads the vocabulary with."""
    padded = version == 1 and saved[1:] == wanted[1:] and saved[0] > wanted[0]
    if saved != wanted and not padded:
        raise ValueError(f"its tensor {name} has the shape {list(saved)}, this model {list(wanted)}")


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(Size(box.offsets), box.values.shape)


def _index(box: Box) -> MetadataIndex:
    return MetadataIndex(box.key, Size(box.offsets))
