"""Runs whose start model is an archive and an adapter in S3: they train as those of the same model in local folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_testing.adapters import logits, write_adapter
from dpo_testing.command import Command
from dpo_testing.corpora import preference_rows, write_jsonl
from dpo_testing.nemo_archives import LLAMA, content, state, write
from dpo_testing.s3server import S3Server

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "all-weights": {},
    "new-adapter": {"lora": {"rank": 2, "alpha": 3}},
    "continued": {"lora": {"continueAdapter": True}},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_archive_and_an_adapter_in_s3_train_as_local_folders(kind: str, s3: S3Server, tmp_path: Path) -> None:
    dpo = Command(tmp_path, {key: value for key, value in s3.environment().items() if key != "AWS_ENDPOINT_URL"})
    write(tmp_path / "m.nemo", content(LLAMA, state(LLAMA)))
    assert dpo("convert", "m.nemo", "base").code == 0
    write_adapter(tmp_path / "base", tmp_path / "sft", r=4)
    s3.make_bucket(kind)
    for name in ("m.nemo", "sft/adapter_config.json", "sft/adapter_model.safetensors"):
        s3.client().upload_file(str(tmp_path / name), kind, name)
    write_jsonl(tmp_path / "train.jsonl", preference_rows(8, seed=1))
    spec = {
        "data": {"train": [{"uri": "train.jsonl"}], "maxLength": 256},
        "training": {"globalBatchSize": 4, "maxSteps": 3, "precision": "fp32", "learningRate": 1e-3},
        **KINDS[kind],
    }
    own = {"storage": {"endpoint": s3.endpoint, "region": "us-east-1"}}
    local = {"huggingFace": {"uri": "base"}, "adapter": {"uri": "sft"}}
    remote = {
        "nemo": {"uri": f"s3://{kind}/m.nemo", **own},
        "adapter": {"uri": f"s3://{kind}/sft/", **own},
    }
    for name, model, words in (("local", local, ()), ("remote", remote, ("--set=parallelism.tensor=2",))):
        processes = "2" if words else "1"
        said = dpo("run", "-f", dpo.write({**spec, "model": model}), "--output", name, "--processes", processes, *words)
        assert said.code == 0, said.all
    one, two = (load(tmp_path / name / "model") for name in ("local", "remote"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-5, name
    if kind != "all-weights":
        adapter = tmp_path / "remote" / "model" / "adapter"
        torch.testing.assert_close(
            logits(tmp_path / "base", adapter), logits(tmp_path / "remote" / "model"), rtol=1e-5, atol=1e-5
        )


def test_an_adapter_that_is_not_in_its_bucket(s3: S3Server, tmp_path: Path) -> None:
    dpo = Command(tmp_path, {key: value for key, value in s3.environment().items() if key != "AWS_ENDPOINT_URL"})
    write(tmp_path / "m.nemo", content(LLAMA, state(LLAMA)))
    write_jsonl(tmp_path / "train.jsonl", preference_rows(8, seed=1))
    s3.make_bucket("empty")
    file = dpo.write(
        {
            "model": {"nemo": {"uri": "m.nemo"}, "adapter": {"uri": "s3://empty/sft/"}},
            "data": {"train": [{"uri": "train.jsonl"}], "maxLength": 256},
            "storage": {"endpoint": s3.endpoint, "region": "us-east-1"},
        }
    )
    said = dpo("run", "-f", file, "--output", "run")
    assert said.code == 11, said.all
    assert "spec.model.adapter.uri: s3://empty/sft/adapter_config.json: does not exist" in said.all


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
