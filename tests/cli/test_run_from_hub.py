"""`dpo run` with a model and data of the Hugging Face Hub, from a small local server that speaks the hub's calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_testing.command import Command
from dpo_testing.hubserver import HubServer, hub_server
from dpo_testing.runs import merged
from dpo_testing.training_world import make

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server(token="hf_right") as running:
        yield running


def world(hub: HubServer, folder: Path) -> dict[str, Any]:
    """Push a model and data, and return a spec that trains on them."""
    spec = make(folder / "made")
    hub.push("org/tiny", folder / "made" / "model")
    hub.push("datasets/org/pairs", {
        "train/a.jsonl": (folder / "made" / "train.jsonl").read_bytes(),
        "valid.jsonl": (folder / "made" / "valid.jsonl").read_bytes(),
    })  # fmt: skip
    return merged(spec, {
        "model": {"huggingFace": {"uri": "hf://org/tiny@main"}},
        "data": {
            "train": [{"uri": "hf://datasets/org/pairs/train/*.jsonl"}],
            "validation": [{"uri": "hf://datasets/org/pairs/valid.jsonl"}],
        },
        "training": {"maxSteps": 4, "validationInterval": 2},
        "checkpoint": {"everySteps": 2},
    })  # fmt: skip


def test_a_run_keeps_the_commits_of_its_first_attempt(hub: HubServer, tmp_path: Path) -> None:
    spec = world(hub, tmp_path)
    first = {name: hub.branches[name, "main"] for name in ("org/tiny", "datasets/org/pairs")}
    dpo = Command(tmp_path, {**hub.environment(tmp_path / "home"), "HF_TOKEN": "hf_right"})
    said = dpo("run", "-f", dpo.write(spec), "--processes", "2")
    assert said.code == 0, said.all
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "revisions.json").read_text()) == {
        "hf://datasets/org/pairs": first["datasets/org/pairs"],
        "hf://org/tiny@main": first["org/tiny"],
    }
    assert len(hub.downloads("model.safetensors")) == 1, "both processes read one copy"
    assert list((tmp_path / "cache" / "hub").glob("models--org--tiny/snapshots/*")), "it is in the cache folder"
    assert "hf_right" not in said.all + (run / "revisions.json").read_text()

    # The branches move: what is there now is neither a model nor data.
    hub.push("org/tiny", {"config.json": b"{}"})
    hub.push("datasets/org/pairs", {"train/a.jsonl": b"no pair\n", "valid.jsonl": b"no pair\n"})
    hub.seen.clear()
    more = dpo("run", "-f", dpo.write(merged(spec, {"training": {"maxSteps": 6}})), "--processes", "2")
    assert more.code == 0, more.all
    assert "step 6/6" in more.out
    moved = {hub.branches[name, "main"] for name in first} - set(first.values())
    assert not [path for _, path, _ in hub.seen if any(commit in path for commit in moved)]
    steps = [json.loads(line).get("step") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(step for step in steps if step is not None) == 6


def test_a_wrong_token_is_one_error(hub: HubServer, tmp_path: Path) -> None:
    spec = world(hub, tmp_path)
    dpo = Command(tmp_path, {**hub.environment(tmp_path / "home"), "HF_TOKEN": "hf_wrong"})
    said = dpo("run", "-f", dpo.write(merged(spec, {"data": {"validation": None}})))
    assert "hf://org/tiny@main: the hub refuses the token; check HF_TOKEN" in said.all
    assert said.code == Outcome.AccessDenied.exit_code
    assert "hf_wrong" not in said.all
