"""Checks a checkpoint's pickle before torch loads it.

torch's distributed checkpoints keep their table of contents in `.metadata`, a pickle that torch reads without
restrictions. A crafted file could run code. So it is first read by an unpickler that allows only the classes that a
valid file needs. If this succeeds, the file refers to no other class and torch can load it safely.
"""

from pathlib import Path

from dpo_api.errors import IncompatibleCheckpointError
from dpo_api.pickles import AllowListUnpickler, Globals

_PLANNER = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
_METADATA = (
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
)
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

ALLOWED: Globals = frozenset(
    {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")}
    | {("torch", name) for name in _DTYPES}
    | {("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {("torch.distributed.checkpoint.metadata", name) for name in _METADATA}
    | {("torch.distributed.checkpoint.planner", name) for name in _PLANNER}
    | {("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreSavePlan", "MCoreMetadata")}
)
"""(module, name) of each global in a checkpoint written by torch 2.x or Megatron-Core."""


class _Reader(AllowListUnpickler):
    allowed = ALLOWED


def check_metadata(path: Path, uri: str) -> None:
    """Raise IncompatibleCheckpointError unless the file is a checkpoint's table of contents only."""
    try:
        with path.open("rb") as file:
            _Reader(file).load()
    except FileNotFoundError:
        raise IncompatibleCheckpointError(
            f"{uri} holds no .metadata: it is not a checkpoint of this software"
        ) from None
    except Exception as error:
        raise IncompatibleCheckpointError(f"{uri}/.metadata is damaged or unsafe to load: {error}") from error
