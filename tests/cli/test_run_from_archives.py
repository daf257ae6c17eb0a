"""Runs that start from archives and checkpoints in S3: divided models read them by ranges, and train as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_api.inputs import Model
from dpo_api.models import read_config
from dpo_api.models.start import start_model
from dpo_store import ObjectInfo, Store, open_store
from dpo_testing.command import Command
from dpo_testing.corpora import preference_rows, sentencepiece_tokenizer, write_jsonl
from dpo_testing.megatron_folders import arguments, core, nemo_members, prefixed, stacked, torch_dist, zarr
from dpo_testing.nemo_archives import GPT_2B, content, saved, state, unpack, write
from dpo_testing.s3server import S3Server
from dpo_trainer.formats.huggingface import open_weights

FORMS = ("old", "old of ranks", "megatron-core", "unpacked", "torch_dist", "zarr")


def make(form: str, folder: Path) -> tuple[str, str]:
    """Write the model; return the kind of its source, and the name of the file or folder."""
    weights = state(GPT_2B)
    tensors = stacked(core(weights), GPT_2B.layers)
    if form == "old":
        write(folder / "m.nemo", content(GPT_2B, weights))
    elif form == "old of ranks":
        write(folder / "m.nemo", content(GPT_2B, weights, tensor=2, pipeline=2))
    elif form == "megatron-core":
        inside = torch_dist(folder / "inside", prefixed(tensors, "model."))
        write(folder / "m.nemo", nemo_members(GPT_2B, weights, inside))
    elif form == "unpacked":
        unpack(folder / "m", content(GPT_2B, weights))
    else:
        place = folder / "m" / "iter_0000005"
        values = {"args": arguments(GPT_2B)}
        if form == "torch_dist":
            torch_dist(place, tensors, {"common_state/shard_0_1": [values]})
        else:
            zarr(place, tensors, parts=2)
            (place / "common.pt").write_bytes(saved(values))
        (folder / "m" / "latest_checkpointed_iteration.txt").write_text("5")
        sentencepiece_tokenizer(folder / "m")
        return "megatron", "m"
    return "nemo", "m" if form == "unpacked" else "m.nemo"


def put(s3: S3Server, bucket: str, folder: Path, form: str) -> dict[str, Any]:
    """Upload what ``make`` writes; return the spec's model."""
    s3.make_bucket(bucket)
    kind, name = make(form, folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.client().upload_file(str(path), bucket, str(path.relative_to(folder)))
    return {kind: {"uri": f"s3://{bucket}/{name}"}}


class Recorder:
    """Counts the bytes that are read through a store."""

    def __init__(self, store: Store) -> None:
        self.store, self.bytes = store, 0

    def read(self, source: str | ObjectInfo, start: int = 0, length: int | None = None) -> bytes:
        data = self.store.read(source, start, length)
        self.bytes += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_tensor_are_read_and_no_more(
    form: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    model = put(s3, f"rows-{form.replace(' ', '-').replace('_', '-')}", tmp_path, form)
    store: Any = Recorder(open_store())
    files, uri = start_model(store, Model.model_validate(model))
    read_config(files, uri)
    weights = open_weights(files, uri)
    tables = store.bytes
    whole = state(GPT_2B)
    assert tables < 150_000, "the tables, and what is read ahead of them"
    for _ in range(2):  # the first read of a distributed checkpoint finds the place inside of the file
        store.bytes = 0
        rows = weights.read("model.layers.1.self_attn.k_proj.weight", (8, 24))
    fused = whole["model.language_model.encoder.layers.1.self_attention.query_key_value.weight"]
    assert torch.equal(rows, fused.view(4, 3, 8, 32)[1:3, 1].reshape(16, 32))
    assert store.bytes == 16 * 32 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("form", "sizes"), [("old of ranks", {"tensor": 2}), ("zarr", {"pipeline": 2})])
def test_a_divided_model_trains_as_one(form: str, sizes: dict[str, int], s3: S3Server, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", preference_rows(8, seed=1))
    bucket = f"run-{form.replace(' ', '-')}"
    spec = {
        "model": put(s3, bucket, tmp_path / "model", form),
        "data": {"train": [{"uri": "train.jsonl"}], "maxLength": 256},
        "training": {"globalBatchSize": 4, "maxSteps": 3, "precision": "fp32", "learningRate": 1e-3},
        "storage": {"endpoint": s3.endpoint, "region": "us-east-1"},
    }
    dpo = Command(tmp_path, {key: value for key, value in s3.environment().items() if key != "AWS_ENDPOINT_URL"})
    file = dpo.write(spec)
    for name, words in {
        "one": ("--processes", "1"),
        "two": ("--processes", "2", *(f"--set=parallelism.{key}={value}" for key, value in sizes.items())),
    }.items():
        said = dpo("run", "-f", file, "--output", f"runs/{name}", *words)
        assert said.code == 0, said.all
    one, two = (load(tmp_path / "runs" / name / "model") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-5, name


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
