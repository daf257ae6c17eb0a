"""A model as a Megatron-Core distributed checkpoint (torch_dist), one file a layer.

Keys are those of Megatron-Core's layer with Transformer Engine, which Megatron-Core uses for both kinds of layers; the
layers' parameters are stacked along a first axis.
"""

import io
import json
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from dpo_api.models.megatron.checkpoint import LATEST
from dpo_api.models.megatron.distributed import TABLE
from dpo_api.models.megatron.outgoing import megatron_arguments, shape_of
from dpo_store import Store, join_uri
from dpo_trainer.checkpoint.files import Written, table
from dpo_trainer.convert.journal import Journal
from dpo_trainer.convert.progress import Progress
from dpo_trainer.convert.whole import LAYER, Whole
from dpo_trainer.formats.export import copy_companions
from dpo_trainer.formats.layout import Slot

ITERATION = "release"
"""Megatron-LM's name of a checkpoint that no training step wrote."""

_FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
_MODULES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
"""Modules of a layer that have a state beside their weights; it is empty."""


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
    every = _Written()
    for number, (_, group) in enumerate(source.groups):
        file = f"__{number}_0.distcp"
        known = journal.done(file)
        if known is None:
            data = io.BytesIO()
            written = _write_group(source, group, file, data, prefix, progress)
            store.write_blocks(join_uri(folder, file), [data.getbuffer()], data.tell())
            journal.add(file, asdict(written))
        else:
            written = _Written(**known)
            progress.skip(sum(box[-1] for box in written.boxes))
        every.add(written)
    store.write(join_uri(folder, "metadata.json"), json.dumps(_BACKEND).encode())
    dtypes = {key: getattr(torch, name) for key, name in every.dtypes.items()}
    objects = {key: (file, first, length) for key, (file, first, length) in every.objects.items()}
    store.write(join_uri(folder, TABLE), table(every.boxes, dtypes, objects))


@dataclass
class _Written:
    """What the table needs of some files, of JSON's types."""

    boxes: list[Written] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    objects: dict[str, list[Any]] = field(default_factory=dict)
    """By key: the file, the first byte and the number of bytes."""

    def add(self, other: Self) -> None:
        """Take what is known of other files, too."""
        self.boxes += other.boxes
        self.dtypes = other.dtypes | self.dtypes
        self.objects |= other.objects


_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _write_group(
    source: Whole, group: list[Slot], file: str, data: io.BytesIO, prefix: str, progress: Progress
) -> _Written:
    found, count, layer = _Written(), source.config.num_layers, None
    for slot in group:
        value = progress.counted(source.parameter(slot))
        name, layer = key_of(slot.parameter)
        key, whole, offsets = prefix + name, list(value.shape), [0] * value.dim()
        if layer is not None:
            value, whole, offsets = value[None], [count, *whole], [layer, *offsets]
        found.boxes.append([key, whole, offsets, list(value.shape), file, *_save(value, data)])
        found.dtypes[key] = str(value.dtype).removeprefix("torch.")
    if layer is not None:
        for module in _MODULES:
            key = f"{prefix}decoder.layers.{module}._extra_state/shard_{layer}_{count}"
            found.objects[key] = [file, *_save([None], data)]
    return found


def _save(value: Tensor | list[None], data: io.BytesIO) -> tuple[int, int]:
    first = data.tell()
    torch.save(value, data)
    return first, data.tell() - first


def key_of(parameter: str) -> tuple[str, int | None]:
    """Return a parameter's key, and its place among the stacked layers if it is one of a layer."""
    found = LAYER.match(parameter)
    if found is None:
        return parameter, None
    name = found[2]
    for ours, fused in _FUSED:
        if name.startswith(ours):
            name = fused + name.removeprefix(ours)
    return f"decoder.layers.{name}", int(found[1])
