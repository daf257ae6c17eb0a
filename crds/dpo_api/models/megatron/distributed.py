"""Distributed checkpoints of Megatron-Core: which tensors they hold, and where.

``torch_dist``: `.metadata` is torch's table of contents, a pickle, and each box of a tensor is a file of ``torch.save``
inside of a `.distcp` file. ``zarr`` (version 2 of the format, until Megatron-Core 0.6): each tensor is a folder with
``.zarray``, which is JSON, and a file for each chunk, named by its place in the grid: ``0.1``. Both are read here, with
neither library: what comes from outside is not unpickled, and Megatron-Core no longer reads zarr.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dpo_api.errors import InvalidModelError
from dpo_api.models.folder import Files
from dpo_api.models.megatron.members import Extent
from dpo_api.models.megatron.stored import Chunk, Form, Stored
from dpo_api.models.megatron.torchfiles import LARGEST_PICKLE, TENSORS, TorchFile, unpickle
from dpo_api.pickles import CHECKPOINT

TABLE = ".metadata"
ZARRAY = ".zarray"
_LARGEST_JSON = 1 << 20
_MOST_CHUNKS = 1_000_000
_ZARR_TYPES = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "bfloat16": "BF16"}
CODECS: dict[str | None, Form] = {None: "raw", "zlib": "zlib", "gzip": "gzip", "zstd": "zstd"}
"""Compressor of a zarr tensor, by its ``id`` → form of its chunks."""


class Record:
    """Holds the fields of a class of the table of contents; nothing of the class is used."""

    fields: Mapping[str, Any] = MappingProxyType({})  # of one that was pickled without any

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            self.fields = state
        elif isinstance(state, tuple):  # TensorProperties: the type first
            self.fields = {"dtype": state[0] if state else None}


def _layout(*_arguments: object) -> None:
    return None


NAMES: dict[tuple[str, str], object] = {
    **{name: type(name[1], (Record,), {}) for name in CHECKPOINT},
    ("pathlib", "PosixPath"): Record,
    **{name: value for name, value in TENSORS.items() if name[1] in ("Size", "OrderedDict") or name in CHECKPOINT},
    ("torch.serialization", "_get_layout"): _layout,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
}
"""What a table of contents may name → what is used in its place."""


class Checkpoint:
    """The tensors and objects of a distributed checkpoint by key."""

    def __init__(self, files: Files, members: Mapping[str, Extent], where: str) -> None:
        """members: the files of its folder. Raises InvalidModelError naming ``where`` for a damaged table."""
        self._files, self._members, self._where = files, members, where
        self.tensors: dict[str, Stored] = {}
        self.objects: dict[str, Extent] = {}
        if TABLE in members:
            self._read_torch()
        elif any(name.endswith(f"/{ZARRAY}") for name in members):
            for name in members:
                if name.endswith(f"/{ZARRAY}"):
                    key = name.removesuffix(f"/{ZARRAY}")
                    self.tensors[key] = self._zarr(key)
        else:
            raise self.error(
                f"it holds neither {TABLE} nor a {ZARRAY}, so it is no distributed checkpoint (torch_dist or zarr);"
                " convert it with Megatron-LM's checkpoint tools"
            )

    def error(self, why: str) -> InvalidModelError:
        """Return the error that names the checkpoint."""
        return InvalidModelError(f"{self._where}: {why}")

    # -- torch_dist

    def _read_torch(self) -> None:
        table = self._members[TABLE]
        if table.size > LARGEST_PICKLE:
            raise self.error(f"its {TABLE} has {table.size:,} bytes; copy it again")
        try:
            self._take(unpickle(table.read(self._files), NAMES))
        except (pickle.UnpicklingError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise self.error(f"its {TABLE} is damaged or unsafe to load: {error}") from None

    def _take(self, table: Any) -> None:
        places: dict[tuple[str, tuple[int, ...] | None], Extent] = {}
        for index, place in table.fields["storage_data"].items():
            key, offset = index.fields["fqn"], index.fields.get("offset")
            if place.fields.get("transform_descriptors"):
                raise ValueError(f"{key} is transformed ({str(place.fields['transform_descriptors'])[:100]})")
            places[key, None if offset is None else _sizes(offset)] = self._part(place.fields)
        for key, entry in table.fields["state_dict_metadata"].items():
            if not isinstance(key, str):
                raise TypeError(f"a key is {str(key)[:100]}")
            if "chunks" not in entry.fields:
                if (key, None) in places:
                    self.objects[key] = places[key, None]
                continue
            shape, dtype = _sizes(entry.fields["size"]), entry.fields["properties"].fields["dtype"]
            if not isinstance(dtype, str):
                raise TypeError(f"{key} has an unknown type")
            chunks = []
            for chunk in entry.fields["chunks"]:
                offsets, sizes = _sizes(chunk.fields["offsets"]), _sizes(chunk.fields["sizes"])
                inside = len(offsets) == len(sizes) == len(shape) and all(
                    offset + size <= whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
                )
                if not inside:
                    raise ValueError(f"a part of {key} is outside of the tensor")
                place = places.get((key, offsets)) or places[key, None]
                chunks.append(Chunk(offsets, sizes, place, "torch"))
            self.tensors[key] = Stored(dtype, shape, tuple(chunks))

    def _part(self, fields: Mapping[str, Any]) -> Extent:
        name, first, length = fields["relative_path"], fields.get("offset", 0), fields["length"]
        member = self._members.get(name) if isinstance(name, str) else None
        if member is None:
            raise ValueError(f"it refers to the file {str(name)[:200]!r}, which is missing; copy the checkpoint again")
        if type(first) is not int or type(length) is not int or first < 0 or length < 0 or first + length > member.size:
            raise ValueError(f"it refers to bytes of {name} that the file does not have")
        return member.part(first, length)

    def value_of(self, key: str, names: Mapping[tuple[str, str], object]) -> Any:
        """Return an object, which is a file of ``torch.save``; None if there is none."""
        found = self.objects.get(key)
        return None if found is None else TorchFile(self._files, found, f"{self._where}: {key}", names).value

    # -- zarr

    def _zarr(self, key: str) -> Stored:
        member = self._members[f"{key}/{ZARRAY}"]
        if member.size > _LARGEST_JSON:
            raise self.error(f"{key}/{ZARRAY} has {member.size:,} bytes; copy the checkpoint again")
        try:
            raw = json.loads(member.read(self._files))
            shape, chunk_shape, dtype, form = _zarr_tensor(raw)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.error(f"{key}/{ZARRAY} cannot be used: {error}") from None
        counts = [-(-size // each) for size, each in zip(shape, chunk_shape, strict=True)]
        if math.prod(counts) > _MOST_CHUNKS:
            raise self.error(f"{key}/{ZARRAY} describes {math.prod(counts):,} chunks; copy the checkpoint again")
        separator = raw.get("dimension_separator", ".")
        chunks = []
        for place in itertools.product(*(range(count) for count in counts)):
            name = f"{key}/{separator.join(map(str, place)) or '0'}"
            found = self._members.get(name)
            if found is None:
                raise self.error(f"{name} is missing; copy the checkpoint again")
            offsets = tuple(number * each for number, each in zip(place, chunk_shape, strict=True))
            chunks.append(Chunk(offsets, chunk_shape, found, form, numbers=math.prod(chunk_shape)))
        return Stored(dtype, shape, tuple(chunks))


def _zarr_tensor(raw: Any) -> tuple[tuple[int, ...], tuple[int, ...], str, Form]:
    """Return the shape, the shape of a chunk, the type and the chunks' form, of a parsed ``.zarray``."""
    shape, chunk = _sizes(raw["shape"]), _sizes(raw["chunks"])
    if len(shape) != len(chunk) or any(not 0 < each <= max(1, size) for each, size in zip(chunk, shape, strict=True)):
        raise ValueError(f"chunks of {list(chunk)} for a tensor of {list(shape)}")
    if raw.get("zarr_format") != 2 or raw.get("order", "C") != "C" or raw.get("filters"):
        raise ValueError("only zarr_format 2 in C order without filters is read")
    dtype = _ZARR_TYPES.get(raw["dtype"])
    if dtype is None:
        raise ValueError(f"dtype is {str(raw['dtype'])[:50]}; known are {', '.join(_ZARR_TYPES)}")
    compressor = (raw.get("compressor") or {}).get("id")
    if compressor not in CODECS:
        raise ValueError(f"compressor is {compressor!r}; known are {', '.join(str(name) for name in CODECS)}")
    return shape, chunk, dtype, CODECS[compressor]


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"a tensor has the shape {str(value)[:100]}")
    return tuple(value)
