"""A model as a Hugging Face folder, one file of weights after the other."""

import torch

from dpo_api.models.folder import INDEX
from dpo_store import Store, join_uri
from dpo_trainer.convert.journal import Journal
from dpo_trainer.convert.progress import Progress
from dpo_trainer.convert.whole import Whole
from dpo_trainer.formats.export import (
    PlannedFile,
    copy_companions,
    file_names,
    index_of,
    plan_shards,
    write_config,
    write_tensors,
)


def write(source: Whole, store: Store, folder: str, journal: Journal, progress: Progress, max_shard_bytes: int) -> None:
    """Write the folder; the index and config.json come last, so that a part of it is no model."""
    plan = [(name, shape, source.dtype_of(name)) for name, shape in source.names]
    shards = plan_shards(plan, max_shard_bytes)
    files = [PlannedFile(name, 0, 0, held) for name, held in zip(file_names(len(shards)), shards, strict=True)]
    for file in files:
        if journal.done(file.name) is None:
            tensors = (progress.counted(source.tensor(name)) for name, _, _ in file.tensors)
            write_tensors(store, join_uri(folder, file.name), file.tensors, tensors)
            journal.add(file.name, file.size)
        else:
            progress.skip(file.size)
    copy_companions(source.files, source.uri, store, folder, None)
    if len(files) > 1:
        store.write(join_uri(folder, INDEX), index_of(files))
    write_config(source.files, source.uri, store, folder, source.config, source.dtype)


def bytes_of(source: Whole) -> int:
    """Return the bytes of the weights as they are written."""
    return sum(torch.Size(shape).numel() * source.dtype_of(name).itemsize for name, shape in source.names)
