"""What a file of ``torch.save`` holds, without torch: its objects, and where in the file each tensor's bytes are.

The file is a zip archive without compression: ``data.pkl``, and a record of raw bytes for each storage. The pickle is
read with replacements of the few names that a file of tensors needs: nothing of torch is called, and one that names
anything else is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dpo_api.errors import InvalidModelError
from dpo_api.models.folder import Objects
from dpo_api.models.megatron.members import Extent, ExtentFile
from dpo_api.pickles import AllowListUnpickler

ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Type of a tensor, as safetensors names it → bytes of an element."""
LARGEST_PICKLE = 256 << 20
_LOCAL_HEADER = 30


@dataclass(frozen=True, slots=True)
class Storage:
    """Elements of one type in a record of the file."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file: its elements from ``first`` of a storage on, in C order."""

    storage: Storage
    first: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Type of its elements."""
        return self.storage.dtype


class Opaque:
    """In the place of a value that is not used."""

    def __init__(self, *_arguments: object, **_named: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _tensor(storage: object, first: object, shape: object, strides: object, *_rest: object) -> Tensor:
    sizes = _counts(shape)
    steps = _counts(strides)
    if not isinstance(storage, Storage) or not isinstance(first, int) or first < 0 or len(sizes) != len(steps):
        raise pickle.UnpicklingError("it describes a tensor that cannot be")
    expected = 1
    for size, step in zip(reversed(sizes), reversed(steps), strict=True):
        if size > 1 and step != expected:
            raise pickle.UnpicklingError(f"a tensor of shape {list(sizes)} is not stored row by row")
        expected *= size
    if first + math.prod(sizes) > storage.count:
        raise pickle.UnpicklingError(f"a tensor of shape {list(sizes)} is larger than its storage")
    return Tensor(storage, first, sizes)


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(size) is int and size >= 0 for size in value):
        raise pickle.UnpicklingError(f"a tensor has the shape {str(value)[:100]}")
    return tuple(value)


def _parameter(tensor: object, *_rest: object) -> object:
    return tensor


_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
TENSORS: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("_io", "BytesIO"): Opaque,  # Transformer Engine's _extra_state
    ("_codecs", "encode"): Opaque,  # bytes in it
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}
"""(module, name) that a file of tensors may name → what is used in its place."""


def unpickle(data: bytes, names: Mapping[tuple[str, str], object]) -> Any:
    """Return the object of a pickle that names nothing but ``names``. Raises UnpicklingError.

    A few bytes can ask the unpickler for gigabytes: by the length of a string, or by the number of a memo. The first
    pass over the pickle, which makes nothing of it, finds both.
    """
    try:
        _check_memo(data)
        return _reader(names)(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # noqa: BLE001 - a crafted pickle can raise anything
        raise pickle.UnpicklingError(f"{type(error).__name__}: {str(error)[:200]}") from None


def _check_memo(data: bytes) -> None:
    for opcode, argument, place in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"byte {place} asks for memory for {argument:,} values")


def _reader(names: Mapping[tuple[str, str], object]) -> type[AllowListUnpickler]:
    class Reader(AllowListUnpickler):
        replaced: ClassVar = names

        def persistent_load(self, found: Any) -> Storage:
            """Return a storage of a file of ``torch.save``."""
            if not isinstance(found, tuple) or len(found) != 5 or found[0] != "storage":
                raise pickle.UnpicklingError("it refers to something that is no storage")
            _, dtype, key, _, count = found
            if dtype not in ITEM_SIZES or not isinstance(key, str) or type(count) is not int or count < 0:
                raise pickle.UnpicklingError("it describes a storage that cannot be")
            return Storage(dtype, key, count)

    return Reader


class TorchFile:
    """One file of ``torch.save``."""

    def __init__(self, files: Objects, extent: Extent, where: str, names: Mapping[tuple[str, str], object]) -> None:
        """Read its table. Raises InvalidModelError naming ``where``. names: see ``unpickle``."""
        self._files, self._extent, self._where = files, extent, where
        try:
            with zipfile.ZipFile(ExtentFile(files, extent, LARGEST_PICKLE)) as found:
                self._records = {entry.filename: entry for entry in found.infolist()}
        except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, OverflowError, EOFError, NotImplementedError):
            raise self._error(
                "not a file of torch.save since PyTorch 1.6 (a zip archive); load and save it again, or copy it again"
            ) from None
        inside = [name for name in self._records if name.endswith("/data.pkl")]
        if len(inside) != 1:
            raise self._error("it holds no data.pkl; copy or download it again")
        self._root = inside[0].removesuffix("data.pkl")
        pickled = self.record(self._root + "data.pkl")
        if pickled.size > LARGEST_PICKLE:
            raise self._error(f"its data.pkl has {pickled.size:,} bytes; copy or download it again")
        if self._root + "byteorder" in self._records:
            order = self.record(self._root + "byteorder")
            if order.size > 16 or order.read(files) != b"little":
                raise self._error("its numbers are not little-endian; save it again on another machine")
        try:
            self.value = unpickle(pickled.read(files), names)
        except pickle.UnpicklingError as error:
            raise self._error(f"its data.pkl is damaged or unsafe to load: {error}") from None

    def record(self, name: str) -> Extent:
        """Return where the bytes of a record are."""
        entry = self._records.get(name)
        if entry is None:
            raise self._error(f"it has no record {name}; copy or download it again")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise self._error(f"its record {name} is compressed, which torch.save does not do; save it again")
        header = self._extent.read(self._files, entry.header_offset, _LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + lengths
        if header[:4] != b"PK\x03\x04" or start + entry.file_size > self._extent.size:
            raise self._error(f"its record {name} is damaged; copy or download it again")
        return self._extent.part(start, entry.file_size)

    def place(self, tensor: Tensor) -> Extent:
        """Return where the tensor's bytes are, in C order."""
        size = ITEM_SIZES[tensor.dtype]
        storage = self.record(f"{self._root}data/{tensor.storage.key}")
        if storage.size < tensor.storage.count * size:
            raise self._error(
                f"its record {tensor.storage.key} has {storage.size:,} bytes for {tensor.storage.count:,} numbers of"
                f" {size} bytes; copy or download it again"
            )
        return storage.part(tensor.first * size, math.prod(tensor.shape) * size)

    def _error(self, why: str) -> InvalidModelError:
        return InvalidModelError(f"{self._where}: {why}")


def tensors_in(value: object) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name; what else is in it is left out."""
    if not isinstance(value, Mapping):
        return {}
    return {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}
