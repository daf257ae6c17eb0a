"""One rank's part of the tests that load a model on several processes."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
import json
import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file

from dpo_api.errors import DPOError
from dpo_api.models import read_config
from dpo_store import ObjectInfo, Store, open_store
from dpo_testing.megatron_ranks import join
from dpo_trainer.formats import delivery
from dpo_trainer.formats.export import export
from dpo_trainer.formats.huggingface import load_weights, open_checkpoint, stage_slots
from dpo_trainer.formats.layout import target
from dpo_trainer.formats.start import StartWeights
from dpo_trainer.model.build import build_model

LARGEST_FILE = 40_000
"""Bytes: each rank writes several files."""

SMALL_BLOCK = 4000
"""Bytes: the tests' matrices are of several blocks."""


class Recorder:
    """A store that records the ranges of weights that are read through it, and the weights that are written."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ranges: list[tuple[str, int, int]] = []
        self.written: list[str] = []

    def stat(self, uri: str) -> Any:
        return self.store.stat(uri)

    def read(self, source: str | ObjectInfo, start: int = 0, length: int | None = None) -> bytes:
        found = self.store.read(source, start, length)
        uri = source if isinstance(source, str) else source.uri
        if uri.endswith(".safetensors"):
            self.ranges.append((uri, start, start + len(found)))
        return found

    def write(self, uri: str, data: bytes) -> None:
        self.store.write(uri, data)

    def write_blocks(self, uri: str, blocks: Iterable[bytes | memoryview], size: int) -> None:
        self.store.write_blocks(uri, blocks, size)
        self.written.append(uri.rpartition("/")[2])


class Full(Recorder):
    """A store whose disk is full when it writes one of the files."""

    def __init__(self, store: Store, name: str) -> None:
        super().__init__(store)
        self.name = name

    def write_blocks(self, uri: str, blocks: Iterable[bytes | memoryview], size: int) -> None:
        if not uri.endswith(f"/{self.name}"):
            super().write_blocks(uri, blocks, size)
            return
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # which ends a write as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_BLOCK, limits[1]))
        try:
            super().write_blocks(uri, blocks, size)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


Layout = tuple[int, int]
"""Tensor and pipeline sizes; data parallelism takes the other ranks."""


@dataclass(frozen=True)
class Cases:
    """What the ranks load, all in the processes of one test."""

    folders: list[Path]  #: each in each layout
    rounded: Path  #: once more as the exact values of a bf16 model
    layouts: list[Layout]
    addresses: list[tuple[Layout, str]]  #: loaded last; some cannot be
    environment: dict[str, str]  #: to reach the addresses


def load(rank: int, cases: Cases, out: Path) -> None:
    """Leave, of each case, the rank's report and, where it loads, the exported model."""
    delivery.BLOCK = SMALL_BLOCK
    os.environ.update(cases.environment)
    for layout in cases.layouts:
        join(*layout)
        for folder in cases.folders:
            _load(folder, place(out, layout, folder.name), rank)
        _load_again(cases.rounded, place(out, layout, "again"), rank)
    delivery.BLOCK = 4 * SMALL_BLOCK  # each is two requests through a slow proxy
    for layout, uri in cases.addresses:
        join(*layout)
        _try(uri, str(cases.rounded), place(out, layout, uri.rpartition("/")[2]), rank)


def place(out: Path, layout: Layout, name: str) -> Path:
    """Return the folder of a case."""
    found = out / f"{layout[0]} {layout[1]} {name}"
    found.mkdir(exist_ok=True)
    return found


def _load(folder: Path, out: Path, rank: int) -> None:
    store = Recorder(open_store())
    config = read_config(store, str(folder))
    model = build_model(config)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    loaded = load_weights(model, store, str(folder))
    report = {"fingerprint": loaded.fingerprint, "bytes": loaded.bytes, "ranges": list(store.ranges)}
    _export(model, str(folder), str(out / "exported"), store)
    (out / f"rank-{rank}.json").write_text(json.dumps({**report, "written": store.written}))
    copies = [slot for slot in stage_slots(model) if slot.duplicate]
    rank_of = parallel_state.get_tensor_model_parallel_rank()
    for slot in copies:
        save_file({"copy": target(model, slot).detach()}, out / f"copy-{rank_of}.safetensors")
    save_file({name: value.detach() for name, value in model.named_parameters()}, out / f"rank-{rank}.safetensors")


def _export(model: Any, source: str, out: str, store: Any) -> list[str]:
    return export(model, open_store(), source, out, max_shard_bytes=LARGEST_FILE, target_store=store)


def _load_again(folder: Path, out: Path, rank: int) -> None:
    """A bf16 model's exact values, in an fp32 model that is exported."""
    store = Recorder(open_store())
    config = read_config(store, str(folder))
    rounded, exact = build_model(config, precision="bf16"), build_model(config)
    source = open_checkpoint(store, str(folder), config)
    load_weights(rounded, store, str(folder), checkpoint=source)
    start = StartWeights(rounded, source)
    names = [name for name, _ in rounded.named_parameters() if start.rounded(name)]
    store.ranges.clear()
    start.deliver(names, lambda name, value: exact.get_parameter(name).data.copy_(value))
    (out / f"rank-{rank}.json").write_text(json.dumps({"ranges": store.ranges}))
    for name in names:
        assert torch.equal(start.value(name), exact.get_parameter(name)), name
    export(exact, open_store(), str(folder), out / "exported")


def _try(uri: str, same: str, out: Path, rank: int) -> None:
    store = open_store()
    found = None
    try:
        model = build_model(read_config(store, uri))
        load_weights(model, store, uri)
        files = _export(model, same, f"{uri}-exported", store)
        last = next(name for name in reversed(files) if name.endswith(".safetensors"))
        if rank == 0:
            (out / "full").mkdir()
        torch.distributed.barrier()
        _export(model, same, str(out / "full"), Full(open_store(), last))
    except DPOError as error:
        found = [type(error).__name__, str(error)]
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
