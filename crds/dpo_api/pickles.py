"""An unpickler that knows only the globals of a list, for pickles that somebody else may have written.

Unpickling a class or a function imports it and may call it, so an unrestricted unpickler runs whatever a crafted pickle
says. Each list is at its reader: `CHECKPOINT` for checkpoints of torch, `dpo_trainer.peers` for messages
between processes, `dpo_api.models.megatron.torchfiles` for models.
"""

import pickle
from collections.abc import Mapping
from typing import ClassVar

Globals = frozenset[tuple[str, str]]
"""(module, name) of classes and functions. Each must be harmless with any arguments."""


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

CHECKPOINT: Globals = frozenset(
    {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")}
    | {("torch", name) for name in _DTYPES}
    | {("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {("torch.distributed.checkpoint.metadata", name) for name in _METADATA}
    | {("torch.distributed.checkpoint.planner", name) for name in _PLANNER}
    | {("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreSavePlan", "MCoreMetadata")}
)
"""Those of the table of contents of a checkpoint that torch 2.x or Megatron-Core has written."""


class AllowListUnpickler(pickle.Unpickler):
    """Raises UnpicklingError for a pickle that names anything outside ``allowed``."""

    allowed: ClassVar[Globals] = frozenset()
    replaced: ClassVar[Mapping[tuple[str, str], object]] = {}
    """(module, name) → what is used in its place; it need not exist."""

    def find_class(self, module: str, name: str) -> object:
        """Return the class or function. Nothing is imported for one that is not in the list."""
        if (module, name) in self.replaced:
            return self.replaced[module, name]
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
