"""Archives and checkpoints that were made to deceive: each is refused with one sentence. Nothing of them is executed,
nothing is written, and none takes memory for what it claims to hold."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zstandard
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dpo_api.errors import InvalidModelError
from dpo_api.inputs import Model
from dpo_api.models import read_config
from dpo_api.models.folder import Files
from dpo_api.models.megatron.distributed import Checkpoint
from dpo_api.models.megatron.members import members as members_of
from dpo_api.models.start import check_weights, start_model
from dpo_testing.command import Command, only_error
from dpo_testing.megatron_folders import arguments, core, stacked, torch_dist, zarr
from dpo_testing.models import local_store
from dpo_testing.nemo_archives import GPT_2B, content, saved, state, unpack, write
from dpo_trainer.formats.huggingface import open_weights

WEIGHTS = "model_weights.ckpt"
LARGEST = 64 << 20
"""Bytes of memory that refusing may take."""
Members = dict[str, bytes]
ZSTD = zstandard.ZstdCompressor()


class Runs:
    """A pickle of it runs a command when it is loaded as usual."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def members() -> Members:
    return content(GPT_2B, state(GPT_2B))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Afterwards it does not exist, and there is nothing beside the input that was not there."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
    assert {name.name for name in tmp_path.iterdir()} <= {"in", "job.yaml", "cache", "train.jsonl"}
    assert [found for found in tmp_path.glob("cache/archives/*") if found.suffix != ".lock"] == []


def refused(path: Path, says: str, kind: str = "nemo") -> None:
    """Reading all of it raises one sentence that says so."""
    files, uri = start_model(local_store(), Model.model_validate({kind: {"uri": str(path)}}))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidModelError, match=says) as raised:
            read_all(files, uri)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LARGEST, f"{peak:,} bytes"
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 900


def read_all(files: Files, uri: str) -> None:
    check_weights(files, uri)
    config = read_config(files, uri)
    weights = open_weights(files, uri)
    weights.check(config)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        weights.read(name)


# -- the archive


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def with_first(first: bytes) -> Callable[[Path, Members], Path]:
    def made(folder: Path, members: Members) -> Path:
        path = write(folder / "m.nemo", members)
        path.write_bytes(first + path.read_bytes())
        return path

    return made


def negative(folder: Path, members: Members) -> Path:
    """A size of -512 in base 256, which the format allows."""
    raw = bytearray(header("x", 0))
    raw[124:136] = b"\xff" * 10 + (0x10000 - 512).to_bytes(2, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw):06o}\0 ".encode()
    return with_first(bytes(raw))(folder, members)


def pax(**values: str) -> bytes:
    """An extended header, whose fields replace those of the next header."""
    text = b""
    for key, value in values.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + len(str(len(line) + len(str(len(line)))))
        text += str(length).encode() + line
    return header("pax", len(text), tarfile.XHDTYPE) + text.ljust(512, b"\0")


BOMB = gzip.compress(bytes(400 << 20))

ARCHIVES: dict[str, tuple[Callable[[Path, Members], Path], str]] = {
    "traversal": (with_first(header("../../canary")), r"member '\.\./\.\./canary' is outside of the archive"),
    "traversal in a name": (with_first(header("a/../../canary")), "is outside of the archive"),
    "absolute": (with_first(header("/tmp/canary")), "is outside of the archive"),
    "backslash": (with_first(header("..\\canary")), "is outside of the archive"),
    "symbolic link": (with_first(header("a", 0, tarfile.SYMTYPE, "/etc/passwd")), "member 'a' is a symbolic link"),
    "hard link": (with_first(header("a", 0, tarfile.LNKTYPE, "/etc/passwd")), "member 'a' is a hard link"),
    "device": (with_first(header("a", 0, tarfile.BLKTYPE)), "member 'a' is a device"),
    "pipe": (with_first(header("a", 0, tarfile.FIFOTYPE)), "member 'a' is a named pipe"),
    "negative size": (negative, "not a usable tar archive|has -512 bytes"),
    "negative size in an extended header": (with_first(pax(size="-512") + header("a")), "tar archive|has -512 bytes"),
    "size beyond the archive": (with_first(header("a", 1 << 40)), r"has 1,099,511,627,776 bytes, and the archive"),
    "header of gigabytes": (with_first(header("a", 1 << 33, tarfile.XHDTYPE)), "not a usable tar archive"),
    "long name of gigabytes": (with_first(header("a", 1 << 33, tarfile.GNUTYPE_LONGNAME)), "not a usable tar archive"),
    "sparse": (with_first(pax(**{"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 50)}) + header("a")), "archive"),
    "two of a name": (with_first(header("model_config.yaml")), "two members model_config.yaml"),
    "a bomb": (lambda folder, _: unpack(folder, {"m.nemo": BOMB}) / "m.nemo", "more than 100 times its size"),
    "a gzip that ends early": (lambda folder, _: unpack(folder, {"m.nemo": BOMB[:5000]}) / "m.nemo", "it ends early"),
    "a damaged gzip": (
        lambda folder, _: unpack(folder, {"m.nemo": gzip.compress(b"abc")[:-8] + b"x" * 8}) / "m.nemo",
        "decompressed",
    ),
    "no archive": (lambda folder, _: unpack(folder, {"m.nemo": b"x" * 5000}) / "m.nemo", "not a usable tar archive"),
    "empty file": (lambda folder, _: unpack(folder, {"m.nemo": b""}) / "m.nemo", "not a usable tar archive"),
}


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.usefixtures("canary")
def test_archives(name: str, members: Members, tmp_path: Path) -> None:
    make, says = ARCHIVES[name]
    refused(make(tmp_path / "in", members), says)


# -- the members


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in records.items():
            file.writestr(f"archive/{name}", data)
    return out.getvalue()


def tensor_pickle(shape: str, strides: str, count: int, first: int = 0) -> bytes:
    """A data.pkl of two tensors, by hand: numbers that torch would not write."""
    storage = f"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI{count}\ntQ"
    tensor = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{first}\n{shape}{strides}I00\n(dtR"
    keys = ("embedding.word_embeddings.weight", "encoder.layers.1.self_attention.dense.weight")
    return f"(d{''.join(f'Vmodel.language_model.{key}{chr(10)}{tensor}s' for key in keys)}.".encode()


def ckpt(data: bytes) -> Callable[[Members, Path], Members]:
    return lambda members, _: {**members, WEIGHTS: data}


def config_text(text: str) -> Callable[[Members, Path], Members]:
    return lambda members, _: {**members, "model_config.yaml": text.encode()}


def changed(**keys: Any) -> Callable[[Members, Path], Members]:
    def change(members: Members, _: Path) -> Members:
        return {**members, "model_config.yaml": yaml.safe_dump({**GPT_2B.config, **keys}).encode()}

    return change


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MEMO = b"\x80\x02}r" + struct.pack("<I", 0x7FFFFFF0) + b"."
MEMBERS: dict[str, tuple[Callable[[Members, Path], Members], str]] = {
    "a global": (
        lambda members, canary: {**members, WEIGHTS: saved({"a": Runs(canary)})},
        "damaged or unsafe to load: it names posix.system",
    ),
    "a global beside the weights": (
        lambda members, canary: {**members, WEIGHTS: saved({**state(GPT_2B), "z": Runs(canary)})},
        "damaged or unsafe to load: it names posix.system",
    ),
    "not a zip": (lambda members, canary: {**members, WEIGHTS: pickle.dumps(Runs(canary))}, "not a file of torch.save"),
    "a memo of gigabytes": (ckpt(zipped({"data.pkl": MEMO})), "asks for memory for"),
    "a text of gigabytes": (ckpt(zipped({"data.pkl": b"\x80\x04\x8d" + b"\xff" * 6 + b"\0\0."})), "unsafe to load"),
    "a zip bomb": (
        ckpt(zipped({"data.pkl": b"\x80\x02}." + bytes(500 << 20)}, zipfile.ZIP_DEFLATED)),
        "data.pkl is compressed, which torch.save does not do",
    ),
    "a negative size": (
        ckpt(zipped({"data.pkl": tensor_pickle("(I-4\nt", "(I1\nt", 4), "data/0": bytes(16)})),
        "shape",
    ),
    "one number for many": (
        ckpt(zipped({"data.pkl": tensor_pickle("(I999999999\nI32\nt", "(I0\nI0\nt", 4), "data/0": bytes(16)})),
        "is not stored row by row",
    ),
    "beyond its storage": (
        ckpt(zipped({"data.pkl": tensor_pickle("(I512\nI32\nt", "(I32\nI1\nt", 4), "data/0": bytes(16)})),
        "is larger than its storage",
    ),
    "beyond its record": (
        ckpt(zipped({"data.pkl": tensor_pickle("(I512\nI32\nt", "(I32\nI1\nt", 16384), "data/0": bytes(16)})),
        r"record 0 has 16 bytes for 16,384 numbers",
    ),
    "no record": (ckpt(zipped({"data.pkl": tensor_pickle("(I512\nI32\nt", "(I32\nI1\nt", 16384)})), "no record"),
    "python in the settings": (
        config_text("model: !!python/object/apply:os.system [touch canary]\n"),
        "not valid YAML",
    ),
    "aliases": (config_text(ALIASES), "YAML aliases are not read"),
    "settings of gigabytes": (
        lambda members, _: {**members, "model_config.yaml": bytes(5 << 20)},
        "has 5,242,880 bytes",
    ),
    "billions of layers": (
        changed(num_layers=10**12),
        "settings name 1,000,000,000,000 layers, and its weights have 2",
    ),
    "negative layers": (changed(num_layers=-1), "num_layers is -1: it must be a positive integer"),
    "another width": (changed(hidden_size=64), "the settings mean"),
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("form", ["packed", "unpacked"])
def test_members(name: str, form: str, members: Members, canary: Path, tmp_path: Path) -> None:
    change, says = MEMBERS[name]
    made = change(members, canary)
    refused(write(tmp_path / "in" / "m.nemo", made) if form == "packed" else unpack(tmp_path / "in", made), says)


# -- distributed checkpoints


KEY = "embedding.word_embeddings.weight"


def table(folder: Path, **changes: Any) -> None:
    """Write a table of contents of one tensor, with some numbers that no writer writes."""
    size, offsets, sizes, place = (
        changes.get(name, value)
        for name, value in (("size", (512, 32)), ("offsets", (0, 0)), ("sizes", (512, 32)), ("place", None))
    )
    chunk = ChunkStorageMetadata(torch.Size(()), torch.Size(()))
    chunk.offsets, chunk.sizes = offsets, sizes
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(()), [chunk])
    entry.size = size
    storage = {MetadataIndex(KEY, torch.Size(offsets)): place or _StorageInfo("__0_0.distcp", 0, 100)}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({KEY: entry}, storage_data=storage)))


def described(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / KEY / ".zarray"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def put(name: str, data: bytes, **changes: Any) -> Callable[[Path], None]:
    """Write a file of the folder, and change the description of the tensor."""

    def change(folder: Path) -> None:
        if changes:
            described(**changes)(folder)
        (folder / name).write_bytes(data)

    return change


TABLES: dict[str, tuple[Callable[[Path], None], str]] = {
    "negative size": (lambda f: table(f, size=(-512, 32)), "a tensor has the shape"),
    "negative offset": (lambda f: table(f, place=_StorageInfo("__0_0.distcp", -5, 100)), "does not have"),
    "negative length": (lambda f: table(f, place=_StorageInfo("__0_0.distcp", 0, -1)), "does not have"),
    "beyond the file": (lambda f: table(f, place=_StorageInfo("__0_0.distcp", 0, 1 << 40)), "does not have"),
    "another file": (lambda f: table(f, place=_StorageInfo("../../../etc/passwd", 0, 10)), "which is missing"),
    "outside of the tensor": (lambda f: table(f, sizes=(513, 32)), "outside of the tensor"),
    "no numbers": (lambda f: table(f, size=("a", "b")), "a tensor has the shape"),
    "not a table": (put(".metadata", pickle.dumps([1, 2])), "unsafe to load"),
    "garbage": (put(".metadata", b"\x00garbage"), "unsafe to load"),
    "a memo of gigabytes": (put(".metadata", MEMO), "asks for memory for"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.usefixtures("canary")
def test_tables_of_contents(name: str, tmp_path: Path) -> None:
    change, says = TABLES[name]
    tensors = stacked(core(state(GPT_2B)), GPT_2B.layers)
    folder = torch_dist(tmp_path / "in", tensors, {"common_state/shard_0_1": {"args": arguments(GPT_2B)}})
    change(folder)
    refused(folder, says, "megatron")


@pytest.mark.parametrize("where", [".metadata", "common.pt", "common_state", "tensor"])
def test_a_global_in_a_checkpoint(where: str, canary: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = stacked(core(state(GPT_2B)), GPT_2B.layers)
    values = {"args": arguments(GPT_2B), "more": Runs(canary)}
    common = {"common_state/shard_0_1": values if where == "common_state" else {"args": arguments(GPT_2B)}}
    folder = torch_dist(tmp_path / "in", tensors, {} if where == "common.pt" else common)
    if where == "common.pt":
        (folder / "common.pt").write_bytes(saved(values))
    elif where == ".metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Runs(canary)))
    elif where == "tensor":
        place = Checkpoint(local_store(), members_of(local_store(), str(folder)), "").tensors[KEY].chunks[0].place
        path, payload = folder / "__0_0.distcp", saved(Runs(canary))
        data = bytearray(path.read_bytes())
        data[place.start : place.start + place.size] = payload.rjust(place.size, b"\0")
        path.write_bytes(data)
    refused(folder, r"it names posix\.system", "megatron")


ZARR: dict[str, tuple[Callable[[Path], None], str]] = {
    "negative size": (described(shape=[-512, 32]), "cannot be used: a tensor has the shape"),
    "chunks of nothing": (described(chunks=[0, 32]), r"chunks of \[0, 32\]"),
    "chunks larger than the tensor": (described(chunks=[1 << 40, 32]), r"chunks of \[1099511627776, 32\]"),
    "billions of chunks": (described(shape=[1 << 40, 32], chunks=[1, 32]), "describes 1,099,511,627,776 chunks"),
    "another codec": (described(compressor={"id": "blosc"}), r"compressor is 'blosc'; known are None, zlib"),
    "a filter": (described(filters=[{"id": "delta"}]), "without filters"),
    "a type": (described(dtype="|O"), r"dtype is \|O; known are"),
    "not JSON": (put(f"{KEY}/.zarray", b"{"), "cannot be used"),
    "a short chunk": (put(f"{KEY}/0.0", b"1234"), "were asked for"),
    "a bomb": (put(f"{KEY}/0.0", zlib.compress(bytes(1 << 28)), compressor={"id": "zlib"}), "more bytes than"),
    "a bomb of zstd": (put(f"{KEY}/0.0", ZSTD.compress(bytes(1 << 28)), compressor={"id": "zstd"}), "more bytes than"),
    "a damaged chunk": (put(f"{KEY}/0.0", b"abc" * 99, compressor={"id": "zstd"}), "cannot be decompressed"),
}


@pytest.mark.parametrize("name", ZARR)
@pytest.mark.usefixtures("canary")
def test_zarr(name: str, tmp_path: Path) -> None:
    change, says = ZARR[name]
    folder = zarr(tmp_path / "in", stacked(core(state(GPT_2B)), GPT_2B.layers))
    (folder / "common.pt").write_bytes(saved({"args": arguments(GPT_2B)}))
    change(folder)
    refused(folder, says, "megatron")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "run"])
def test_the_command_says_so_in_one_sentence(command: str, members: Members, canary: Path, tmp_path: Path) -> None:
    from dpo_api.errors import Outcome

    write(tmp_path / "in" / "m.nemo", {**members, WEIGHTS: saved({"a": Runs(canary)})})
    (tmp_path / "in" / "train.jsonl").write_text('{"prompt": "a", "chosen_response": "b", "rejected_response": "c"}\n')
    dpo = Command(tmp_path)
    spec = {"model": {"nemo": {"uri": "in/m.nemo"}}, "data": {"train": [{"uri": "in/train.jsonl"}]}}
    said = dpo(command, "-f", dpo.write(spec)) if command == "run" else dpo(command, dpo.write(spec))
    assert "it names posix.system" in only_error(said, Outcome.InvalidModel)
