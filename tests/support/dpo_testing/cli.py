"""For tests of the `dpo` command: a small world on disk, and a trainer that replays instead of training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from dpo_api.models.adapter import WEIGHTS
from dpo_cli.__main__ import run

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = [str(ROOT / package) for package in ("crds", "operator", "trainer")]

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Said:
    """What one command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        """Both streams."""
        return self.out + self.err


Dpo = Callable[..., Said]


def in_this_process(capfd: pytest.CaptureFixture[str]) -> Dpo:
    """Return a function that runs `dpo` with its arguments in this process. No command may print a traceback."""

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        code = run(arguments)
        captured = capfd.readouterr()
        said = Said(code, captured.out, captured.err)
        assert "Traceback" not in said.all
        return said

    return call


@dataclass
class World:
    """A folder with a model's files, 100 pairs and a manifest that names them."""

    folder: Path
    spec: dict[str, Any]

    def write(self, name: str = "job.yaml", job: str = "tiny") -> str:
        """Write the manifest and return its path."""
        document = {
            "apiVersion": "dpo-operator.dev/v1alpha1",
            "kind": "DPOJob",
            "metadata": {"name": job},
            "spec": self.spec,
        }
        path = self.folder / name
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return str(path)


def good_adapter(world: World, **config: Any) -> None:
    """Let the job continue an adapter of rank 2 of the last layer's queries; ``config``: more keys of its file."""
    folder = world.folder / "sft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    save_file({f"{name}A.weight": np.zeros((2, 64)), f"{name}B.weight": np.zeros((64, 2))}, folder / WEIGHTS)
    world.spec["model"]["adapter"] = {"uri": str(folder)}
    world.spec["lora"] = {"continueAdapter": True}


def pairs(count: int) -> str:
    """Return that many records, one a line."""
    return "".join(json.dumps({"prompt": f"q{i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(count))


@dataclass
class Replay:
    """A trainer that replays a script instead of training; see replay_trainer.py."""

    folder: Path

    def environment(self, script: Mapping[str, Any]) -> dict[str, str]:
        """Return the environment in which the trainer replays the script."""
        path = self.folder / "replay.json"
        path.write_text(json.dumps(script))
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), *PACKAGES]), "DPO_REPLAY": str(path)}

    def start(self, script: Mapping[str, Any], *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start `python -m dpo_cli` with the replaying trainer behind it."""
        command = [sys.executable, "-m", "dpo_cli", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment(script), **(pipes | options))

    def run(self, script: Mapping[str, Any], *arguments: str) -> Said:
        """Run `python -m dpo_cli` to its end."""
        child = self.start(script, *arguments)
        out, err = child.communicate(timeout=60)
        assert "Traceback" not in out + err
        return Said(child.returncode, out, err)


def make_world(folder: Path) -> World:
    """Write the world's files into a folder."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "model.safetensors").write_bytes(bytes(1000))
    (model / "tokenizer.json").write_text("{}")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(pairs(100))
    (folder / "data" / "heldout.jsonl").write_text(pairs(20))
    spec = {
        "model": {"huggingFace": {"uri": str(model)}},
        "data": {
            "train": [{"uri": str(folder / "data" / "train.jsonl")}],
            "validation": [{"name": "heldout", "uri": str(folder / "data" / "heldout.jsonl")}],
            "maxLength": 128,
        },
        "training": {"globalBatchSize": 10, "schedule": {"warmupSteps": 2}},
    }
    return World(folder, spec)


def make_replay(folder: Path) -> Replay:
    """Put the replaying trainer into a folder, as a package that is found before the real one."""
    (folder / "dpo_trainer").mkdir(parents=True)
    (folder / "dpo_trainer" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("replay_trainer.py"), folder / "dpo_trainer" / "__main__.py")
    return Replay(folder)
