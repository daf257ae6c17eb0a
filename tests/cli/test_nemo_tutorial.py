"""NeMo-Aligner's DPO tutorial, command by command, on a tiny archive of GPT-2B-001's shape: docs/tutorial.md."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from dpo_api.inputs import Model
from dpo_api.models import read_config
from dpo_api.models.start import start_model
from dpo_testing.command import Command
from dpo_testing.corpora import preference_rows, write_jsonl
from dpo_testing.models import local_store
from dpo_testing.nemo_archives import GPT_2B, content, logits, replace, state, write
from dpo_trainer.formats.huggingface import open_weights

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = replace(GPT_2B, positions=4096)
ARCHIVE = "GPT-2B-001_bf16_tp1.nemo"
# What the tutorial's cluster has and this machine has not.
HERE = {
    "storage": None,
    "transformerEngine": None,
    "logging": None,
    "data.maxLength": 256,
    "training.precision": "fp32",
    "training.globalBatchSize": 8,
    "training.learningRate": 3e-3,
    "training.epochs": 8,
    "training.schedule": {"warmupSteps": 0},
}


def sets(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def data(train: str = "train_dpo_format.jsonl") -> dict[str, Any]:
    return {
        "data.train": [{"uri": train}],
        "data.validation": [{"name": "validation", "uri": "valid_dpo_format.jsonl"}],
    }


def start(model: dict[str, Any]) -> dict[str, Any]:
    return {"model": model}


class Steps:
    """Runs `dpo run` on an example with changes, and keeps what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.dpo = Command(folder)
        self.folder = folder

    def run(self, example: str, name: str, *changes: dict[str, Any]) -> Path:
        shutil.copy(EXAMPLES / example, self.folder / example)
        merged: dict[str, Any] = {**HERE, "checkpoint": {"uri": f"results/{name}"}}
        for change in changes:
            merged |= change
        said = self.dpo("run", "-f", example, *sets(merged))
        assert said.code == 0, said.all
        return self.folder / "results" / name


def curve(run: Path, name: str) -> list[float]:
    """The values of a metric, from the first step on."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_the_tutorial(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    write_jsonl(tmp_path / "train_dpo_format.jsonl", preference_rows(24, seed=1))
    write_jsonl(tmp_path / "valid_dpo_format.jsonl", preference_rows(8, seed=2))

    # Obtaining a pretrained model: the file as it is downloaded; tar -xvf is not needed, and gives the same model.
    write(tmp_path / ARCHIVE, content(TINY, state(TINY)))
    (tmp_path / "model_checkpoint").mkdir()
    subprocess.run(["tar", "-xf", ARCHIVE, "-C", "model_checkpoint"], cwd=tmp_path, check=True)
    said = steps.dpo(
        "validate",
        steps.dpo.write({"model": {"nemo": {"uri": ARCHIVE}}, "data": {"train": data()["data.train"]}}),
    )
    assert said.code == 0, said.all

    # Supervised fine-tuning
    sft = steps.run("sft.yaml", "sft", start({"nemo": {"uri": "model_checkpoint"}}), data(), {"data.appendEos": False})
    losses = curve(sft, "train/sft_loss")
    assert losses[-1] < losses[0]
    tuned = {"huggingFace": {"uri": "results/sft/model"}}

    # DPO, all parameters: the tutorial's run
    formats = {"output.formats": ["huggingFace", "nemo", "megatron"]}
    full = steps.run("nemo-tutorial.yaml", "full", start(tuned), data(), formats)
    check_curves(full)

    # the same with LoRA, from the archive itself
    lora = steps.run("nemo-tutorial.yaml", "lora", start({"nemo": {"uri": ARCHIVE}}), data(), {"lora": {"rank": 4}})
    check_curves(lora)
    assert (lora / "model" / "adapter" / "adapter_model.safetensors").exists()

    # RPO with rewards in the data
    rows = [{**row, "chosen_reward": 2.0, "rejected_reward": 0.5} for row in preference_rows(24, seed=1)]
    write_jsonl(tmp_path / "rewards.jsonl", rows)
    rpo = steps.run("nemo-tutorial.yaml", "rpo", start(tuned), data("rewards.jsonl"), {"dpo.loss": "rpo_bwd_kl"})
    assert all(map(math.isfinite, curve(rpo, "train/loss")))

    # Reading the curves, and using the result
    said = steps.dpo("report", "results/full/")
    assert said.code == 0, said.all
    check_other_formats(full / "model")
    for run in (sft, full, lora, rpo):
        check_result(run / "model")


def check_curves(run: Path) -> None:
    """The first loss is ln 2, the tutorial's metrics are there, and the margin rises."""
    assert curve(run, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("acc", "rewards_chosen_mean", "rewards_rejected_mean"):
        assert curve(run, f"train/{name}"), name
        assert curve(run, f"val/{name}"), name
    margins = curve(run, "train/rewards_margin")
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 0.01


@torch.no_grad()
def check_result(folder: Path) -> None:
    """A folder that transformers loads: a model that has learned something, and the archive's tokenizer."""
    from transformers import AutoTokenizer, StableLmForCausalLM

    assert read_config(local_store(), str(folder)).family == "stablelm"
    tokens = torch.arange(20) + 30
    found = StableLmForCausalLM.from_pretrained(folder)(tokens[None]).logits[0]
    assert 1e-4 < (found - logits(TINY, state(TINY), tokens)).abs().max() < math.inf
    pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for row in preference_rows(5):
        assert AutoTokenizer.from_pretrained(folder)(row["prompt"]).input_ids == pieces.EncodeAsIds(row["prompt"])


def check_other_formats(folder: Path) -> None:
    """The archive and the checkpoint hold the model of the folder, bit by bit."""
    expected = load_file(folder / "model.safetensors")
    for kind, place in (("nemo", folder / "model.nemo"), ("megatron", folder / "megatron")):
        files, uri = start_model(local_store(), Model.model_validate({kind: {"uri": str(place)}}))
        assert read_config(files, uri).family == "stablelm"
        weights = open_weights(files, uri)
        for name, value in expected.items():
            assert torch.equal(weights.read(name), value), (kind, name)
