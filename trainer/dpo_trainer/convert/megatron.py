"""A model as a Megatron-Core distributed checkpoint (torch_dist), one file a layer.

Keys are those of Megatron-Core's layer with Transformer Engine, which Megatron-Core uses for both kinds of layers; the
layers' parameters are stacked along a first axis.
"""

import io
import json
import pickle
import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dpo_api.models.megatron.checkpoint import LATEST
from dpo_api.models.megatron.distributed import TABLE
from dpo_api.models.megatron.outgoing import megatron_arguments, shape_of
from dpo_store import Store, join_uri
from dpo_trainer.convert.journal import Journal
from dpo_trainer.convert.progress import Progress
from dpo_trainer.convert.whole import Whole
from dpo_trainer.formats.export import copy_companions
from dpo_trainer.formats.layout import Slot

ITERATION = "release"
"""Megatron-LM's name of a checkpoint that no training step wrote."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
_MODULES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
"""Modules of a layer that have a state beside their weights; it is empty."""

Note = list[Any]
"""What the table needs of one tensor or object, of JSON's types: key, whole shape (null for an object), offsets, sizes,
type, file, first byte, bytes."""


def write(source: Whole, store: Store, folder: str, journal: Journal, progress: Progress) -> None:
    """Write a folder that Megatron-LM loads with ``--load``; the tables come last."""
    arguments = megatron_arguments(shape_of(source.config, source.uri), source.uri)
    checkpoint = join_uri(folder, ITERATION)
    write_weights(source, store, checkpoint, journal, progress)
    common = io.BytesIO()
    torch.save({"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 0}, common)
    store.write(join_uri(checkpoint, "common.pt"), common.getvalue())
    copy_companions(source.files, source.uri, store, folder, None)
    store.write(join_uri(folder, LATEST), f"{ITERATION}\n".encode())


def write_weights(
    source: Whole, store: Store, folder: str, journal: Journal, progress: Progress, prefix: str = ""
) -> None:
    """Write the checkpoint's files and its tables. Memory: twice the parameters of a layer, or of the embedding."""
    notes: list[Note] = []
    for number, group in enumerate(_groups(source.slots)):
        file = f"__{number}_0.distcp"
        known = journal.done(file)
        if known is None:
            data = io.BytesIO()
            known = list(_write_group(source, group, file, data, prefix, progress))
            store.write_blocks(join_uri(folder, file), [data.getbuffer()], data.tell())
            journal.add(file, known)
        else:
            progress.skip(sum(note[7] for note in known if note[1] is not None))
        notes += known
    store.write(join_uri(folder, "metadata.json"), json.dumps(_BACKEND).encode())
    store.write(join_uri(folder, TABLE), table(notes))


def _offsets(slot: Slot, layer: int | None) -> list[int]:
    zeros = [0] * len(slot.shapes[0])
    return zeros if layer is None else [layer, *zeros]


_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _groups(held: list[Slot]) -> Iterator[list[Slot]]:
    """Yield the parameters of each file."""

    def layer(slot: Slot) -> str:
        found = _LAYER.match(slot.parameter)
        return found[1] if found else slot.parameter

    for _, group in groupby(held, layer):
        yield list(group)


def _write_group(
    source: Whole, group: list[Slot], file: str, data: io.BytesIO, prefix: str, progress: Progress
) -> Iterator[Note]:
    count = source.config.num_layers
    layer = None
    for slot in group:
        value = progress.counted(source.parameter(slot))
        key, layer = key_of(slot.parameter)
        whole = list(value.shape)
        if layer is not None:
            value, whole = value[None], [count, *whole]
        offsets = _offsets(slot, layer)
        first, length = _save(value, data)
        kind = str(value.dtype).removeprefix("torch.")
        yield [prefix + key, whole, offsets, list(value.shape), kind, file, first, length]
    if layer is not None:
        for module in _MODULES:
            first, length = _save([None], data)
            key = f"{prefix}decoder.layers.{module}._extra_state/shard_{layer}_{count}"
            yield [key, None, None, None, None, file, first, length]


def _save(value: Tensor | list[None], data: io.BytesIO) -> tuple[int, int]:
    first = data.tell()
    torch.save(value, data)
    return first, data.tell() - first


def key_of(parameter: str) -> tuple[str, int | None]:
    """Return a parameter's key, and its place among the stacked layers if it is one of a layer."""
    found = _LAYER.match(parameter)
    if found is None:
        return parameter, None
    name = found[2]
    for ours, fused in _FUSED:
        if name.startswith(ours):
            name = fused + name.removeprefix(ours)
    return f"decoder.layers.{name}", int(found[1])


def table(notes: list[Note]) -> bytes:
    """Return the table of contents: a pickle of torch's ``Metadata``."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, whole, offsets, sizes, kind, file, first, length in notes:
        index = MetadataIndex(key)
        if whole is None:
            entries[key] = BytesStorageMetadata()
        else:
            found = entries.setdefault(
                key, TensorStorageMetadata(TensorProperties(getattr(torch, kind)), Size(whole), [])
            )
            assert isinstance(found, TensorStorageMetadata)  # noqa: S101 - keys of tensors and objects differ
            found.chunks.append(ChunkStorageMetadata(Size(offsets), Size(sizes)))
            index = MetadataIndex(key, Size(offsets))
        places[index] = _StorageInfo(file, first, length)
    return pickle.dumps(Metadata(dict(entries), storage_data=places))
