"""`dpo run` as users run it: a process of its own, the real trainer, a real S3 server; what comes out is opened by the
libraries that people open it with."""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_api.metrics import METRICS
from dpo_api.progress import Progress
from dpo_api.spec import Loss
from dpo_testing import papers
from dpo_testing.cli import Said
from dpo_testing.command import Command, quiet_log
from dpo_testing.corpora import write_jsonl
from dpo_testing.runs import merged
from dpo_testing.s3server import S3Server, free_port
from dpo_testing.training_world import VOCABULARY, make, preferences, write_model

pytestmark = pytest.mark.slow

BETA, SCALE, GAP = 0.3, 1.7, 0.75


@pytest.fixture
def dpo(tmp_path: Path) -> Command:
    return Command(tmp_path)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def upload(s3: S3Server, folder: Path, bucket: str, prefix: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.client().upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")


def download(s3: S3Server, bucket: str, prefix: str, folder: Path) -> Path:
    for item in s3.client().list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        target = folder / item["Key"].removeprefix(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.client().download_file(bucket, item["Key"], str(target))
    return folder


# -- everything in S3


def world_in_s3(s3: S3Server, folder: Path) -> dict[str, Any]:
    """A model under a prefix; training data under a prefix and by a glob, .gz and .zst; held-out data plain."""
    for bucket in ("models", "prefs", "runs"):
        s3.make_bucket(bucket)
    write_model(folder / "model")
    rows = preferences(24, seed=1)
    for name, part in {
        "train/a.jsonl.gz": rows[:7],
        "train/b.jsonl.zst": rows[7:12],
        "more/part-1.jsonl.zst": rows[12:16],
        "more/part-2.jsonl.gz": rows[16:],
        "more/README.md": [],
        "heldout.jsonl": preferences(5, seed=2),
    }.items():
        write_jsonl(folder / "prefs" / name, part)
    upload(s3, folder / "model", "models", "tiny")
    upload(s3, folder / "prefs", "prefs", "v1")
    return {
        "model": {"huggingFace": {"uri": "s3://models/tiny/"}},
        "data": {
            "train": [{"uri": "s3://prefs/v1/train/"}, {"uri": "s3://prefs/v1/more/*.jsonl.*"}],
            "validation": [{"name": "heldout", "uri": "s3://prefs/v1/heldout.jsonl"}],
            "maxLength": 128,
            "boundary": "separate",
        },
        "training": {
            "globalBatchSize": 8,
            "learningRate": 2e-3,
            "schedule": {"warmupSteps": 0},
            "epochs": 4,
            "precision": "fp32",
        },
        "checkpoint": {"uri": "s3://runs/tiny/", "everySteps": 5, "keep": 2},
        "storage": {"endpoint": s3.endpoint, "region": "us-east-1"},
        "resources": {"nodes": 2, "processesPerNode": 8},
    }


@pytest.mark.nightly  # the end-to-end suite trains from S3 to S3, tests/distributed saves to S3
def test_two_processes_with_everything_in_s3(tmp_path: Path, s3: S3Server) -> None:
    dpo = Command(tmp_path, preloaded=False)  # one whole run with new interpreters, as users start it
    spec = world_in_s3(s3, dpo.folder)
    keys = {name: value for name, value in s3.environment().items() if name != "AWS_ENDPOINT_URL"}
    command = ("run", "-f", dpo.write(spec), "--processes", "2")
    said = dpo(*command, **keys)
    assert said.code == 0, said.all
    assert "tiny  2 processes · run directory s3://runs/tiny/" in said.out
    assert "ignored: applies to clusters only: resources.nodes" in said.out
    assert "24 pairs, 0 dropped" in said.out
    assert "step 12/12" in said.out
    assert "result      validation: accuracy " in said.out
    assert "model       s3://runs/tiny/model" in said.out
    assert "report      s3://runs/tiny/report.html" in said.out
    assert not (dpo.folder / "runs").exists(), "nothing of the run is left on this machine"

    run = download(s3, "runs", "tiny/", dpo.folder / "fetched")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000010", "step-000012"]
    record = events((run / "metrics" / "attempt-0001.jsonl").read_text())
    assert [event["step"] for event in record if "train/loss" in event] == list(range(1, 13))
    first = next(event for event in record if "train/loss" in event)
    assert abs(first["train/preference_loss"] - math.log(2)) < 1e-4
    held_out = [event["val/loss"] for event in record if "val/loss" in event]
    assert abs(held_out[0] - math.log(2)) < 1e-4, "validated before the first step"
    assert held_out[-1] != held_out[0]
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "Succeeded" in page

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    before = AutoModelForCausalLM.from_pretrained(dpo.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("please answer", return_tensors="pt").input_ids
    with torch.no_grad():
        assert (model(ids).logits - before(ids).logits).abs().max() > 1e-3, "the model has moved"
    assert margin_of(model, tokenizer) > margin_of(before, tokenizer)

    marker = s3.client().head_object(Bucket="runs", Key="tiny/model/model.safetensors")["LastModified"]
    again = dpo(*command, **keys)
    assert again.code == 0, again.all
    assert "this run was already finished: there was nothing to do" in again.out
    assert "model       s3://runs/tiny/model" in again.out
    assert "result      validation: accuracy " in again.out
    assert s3.client().head_object(Bucket="runs", Key="tiny/model/model.safetensors")["LastModified"] == marker


def margin_of(model: Any, tokenizer: Any) -> float:
    """Mean of log π(chosen) − log π(rejected) over the training pairs, by transformers alone."""
    gaps = []
    for row in preferences(24, seed=1):
        prompt = tokenizer(row["prompt"]).input_ids
        sides = [log_prob(model, prompt, response_ids(tokenizer, row[f"{side}_response"])) for side in SIDES]
        gaps.append(sides[0] - sides[1])
    return sum(gaps) / len(gaps)


SIDES = ("chosen", "rejected")


def response_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], response: list[int]) -> float:
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
    return float(torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None]).sum())


# -- the first step


@pytest.fixture
def first_step(tmp_path: Path) -> dict[str, Any]:
    """One step over 8 pairs whose rewards differ by GAP each."""
    spec = make(tmp_path, pairs=8, validation=1)
    rows = [row | {"chosen_reward": 1.0 + i, "rejected_reward": 1.0 + i - GAP} for i, row in enumerate(preferences(8))]
    write_jsonl(tmp_path / "train.jsonl", rows)
    changes = {"training": {"maxSteps": 1}, "dpo": {"beta": BETA, "gtRewardScale": SCALE}}
    return merged(spec, {**changes, "checkpoint": None})


def first(dpo: Command, spec: dict[str, Any], *arguments: str) -> dict[str, Any]:
    said = dpo("run", "-f", dpo.write(spec), "-o", "out", *arguments)
    assert said.code == 0, said.all
    quiet_log(dpo.folder / "out")
    found = events((dpo.folder / "out" / "metrics.jsonl").read_text())
    return next(event for event in found if "train/loss" in event)


@pytest.mark.parametrize("loss", [loss for loss in Loss if loss.row.needs_reference])
def test_the_first_steps_loss_is_the_closed_form(loss: Loss, dpo: Command, first_step: dict[str, Any]) -> None:
    smoothed = ["--set", f"dpo.labelSmoothing={papers.SMOOTHING}"] if loss.row.smooths else []
    event = first(dpo, first_step, "--set", f"dpo.loss={loss}", *smoothed)
    expected = papers.at_start(papers.settings_of(loss, beta=BETA, gt_reward_scale=SCALE), GAP)
    assert event["train/preference_loss"] == pytest.approx(expected, abs=1e-4)
    assert event["train/loss"] == event["train/preference_loss"]
    assert event["train/rewards_chosen_mean"] == pytest.approx(0, abs=1e-4)
    assert event["train/rewards_margin"] == pytest.approx(0, abs=1e-4)
    assert "train/sft_loss" not in event


def test_the_first_steps_loss_of_a_mixture_is_the_closed_form(dpo: Command, first_step: dict[str, Any]) -> None:
    mixture = "dpo.losses=[{loss: dpo, weight: 0.8}, {loss: bco_pair, weight: 0.2}, {loss: rpo_sq}]"
    event = first(dpo, first_step, "--set", mixture, "--set", "dpo.sftWeight=0.5")
    expected = 0.8 * math.log(2) + 0.2 * 2 * math.log(2) + (SCALE * GAP) ** 2
    assert event["train/preference_loss"] == pytest.approx(expected, abs=1e-4)
    assert event["train/loss"] == pytest.approx(event["train/preference_loss"] + 0.5 * event["train/sft_loss"])


def test_simpo_has_no_reference(dpo: Command, first_step: dict[str, Any]) -> None:
    """A head of zeros gives both responses the same mean: what is left of the loss is the margin."""
    equal_tokens(dpo)
    event = first(dpo, first_step, "--set", "dpo.loss=simpo", "--set", "dpo.simpoGamma=1.5")
    assert event["train/preference_loss"] == pytest.approx(math.log(1 + math.exp(1.5)), rel=1e-5)
    assert event["train/rewards_chosen_mean"] == pytest.approx(-BETA * math.log(VOCABULARY), rel=1e-5)
    assert event["train/rewards_margin"] == pytest.approx(0, abs=1e-5)


def equal_tokens(dpo: Command) -> None:
    """Give every token the probability 1/V."""
    weights = dpo.folder / "model" / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(weights)
    tensors["lm_head.weight"] = torch.zeros_like(tensors["lm_head.weight"])
    save_file(tensors, weights, {"format": "pt"})


def test_the_first_steps_sft_term_is_the_closed_form(dpo: Command, first_step: dict[str, Any]) -> None:
    """−log π of a response is then its length times ln V."""
    equal_tokens(dpo)
    tokenizer = AutoTokenizer.from_pretrained(dpo.folder / "model")
    lengths = [len(response_ids(tokenizer, row["chosen_response"])) for row in preferences(8)]
    expected = sum(lengths) / 8 * math.log(VOCABULARY)
    event = first(dpo, first_step, "--set", "dpo.sftWeight=0.25", "--set", "dpo.preferenceWeight=2")
    assert event["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert event["train/sft_loss"] == pytest.approx(expected, rel=1e-5)
    assert event["train/loss"] == pytest.approx(2 * math.log(2) + 0.25 * expected, rel=1e-5)


# -- everything that may be asked for, at once: LoRA, a port, TensorBoard, Weights & Biases


class Watcher(threading.Thread):
    """Asks the run's server until it has trained a step and the figures are there, or until the run has ended."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.base = f"http://127.0.0.1:{port}"
        self.answers: dict[str, str] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set() and not self._trained():
            time.sleep(0.01)

    def _trained(self) -> bool:
        try:
            status = Progress.from_json(self._get("/status"))
            if status.phase != "train" or status.step == 0:
                return False
            self.answers = {path: self._get(path) for path in ("/metrics", "/healthz", "/status")}
        except OSError:
            return False
        return True

    def _get(self, path: str) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.base + path, timeout=5) as answer:
            text: str = answer.read().decode()
            return text


def test_lora_with_a_port_and_every_log(dpo: Command, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("wandb")
    spec = merged(
        make(tmp_path, pairs=16, validation=4),
        {
            "lora": {"rank": 4, "targetModules": ["attention", "mlp"]},
            "training": {"maxSteps": 60, "learningRate": 1e-2, "validationInterval": 30},
            "logging": {"tensorboard": {"enabled": True}, "wandb": {"project": "tests", "mode": "offline"}},
            "output": {"uri": "elsewhere/model"},
        },
    )
    port = free_port()
    watcher = Watcher(port)
    watcher.start()
    settings = ("--set", "training.maxSteps=40", "--set", "dpo.beta=0.2")
    said = dpo("run", "-f", dpo.write(spec), "-o", "out", "--port", str(port), *settings)
    watcher.ended.set()
    watcher.join()
    assert said.code == 0, said.all
    assert "step 40/40" in said.out
    quiet_log(tmp_path / "out")
    the_server_answered(watcher.answers)
    the_logs_agree(tmp_path / "out")
    the_adapter_loads(tmp_path, said)


def the_server_answered(answers: dict[str, str]) -> None:
    assert answers["/healthz"] == "ok\n"
    status = Progress.from_json(answers["/status"])
    assert (status.phase in ("train", "validate", "checkpoint"), status.total) == (True, 40)
    assert "train/loss" in status.metrics
    text = answers["/metrics"]
    trained = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}
    ours = {metric.name for metric in METRICS}
    assert {name for name in trained if name.startswith("dpo_")} <= ours, "a name that is not in the table"
    always = ("loss", "preference_loss", "reward_accuracy_ratio", "reward_margin", "grad_norm", "learning_rate")
    assert {f"dpo_train_{name}" for name in always} <= trained
    assert {"dpo_val_loss", "dpo_train_planned_steps", "dpo_data_pairs", "dpo_trainer_info"} <= trained
    assert 'job="tiny"' in text


def the_logs_agree(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = events((run / "metrics.jsonl").read_text())
    losses = {event["step"]: event["train/loss"] for event in record if "train/loss" in event}
    assert sorted(losses) == list(range(1, 41))
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert {item.step: item.value for item in board.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    assert [item.step for item in board.Scalars("val/acc")] == [0, 30, 40]
    assert len(list(run.rglob("run-*.wandb"))) == 1
    given = json.loads((run / "spec.json").read_text())["spec"]
    assert (given["training"]["maxSteps"], given["dpo"]["beta"]) == (40, 0.2)


def the_adapter_loads(folder: Path, said: Said) -> None:
    """The merged folder and the adapter on the base are one model, and not the base."""
    from peft import PeftModel

    assert "model       elsewhere/model" in said.out
    assert not (folder / "out" / "model").exists()
    ids = torch.arange(5, 25)[None]
    merged_model = AutoModelForCausalLM.from_pretrained(folder / "elsewhere" / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        start = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "elsewhere" / "model" / "adapter")(ids).logits
        together = merged_model(ids).logits
    assert (adapted - together).abs().max() < 1e-4
    assert (together - start).abs().max() > 1e-2
    files = sorted(path.name for path in (folder / "elsewhere" / "model" / "adapter").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
