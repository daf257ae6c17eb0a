"""`dpo validate` of a model and data on the Hugging Face Hub, at a small local server that speaks the hub's calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from dpo_api.errors import Outcome
from dpo_store import RetryPolicy
from dpo_testing.cli import Dpo, World, good_adapter
from dpo_testing.hubserver import Failure, HubServer, hub_server, used_here


@pytest.fixture
def hub(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that holds the world's model and data, named by the world's spec."""
    with hub_server() as running:
        used_here(running, world.folder, monkeypatch)
        running.push("org/tiny", world.folder / "model")
        running.push("datasets/org/pairs", world.folder / "data", branch="v1")
        world.spec["model"]["huggingFace"]["uri"] = "hf://org/tiny"
        world.spec["data"]["train"][0]["uri"] = "hf://datasets/org/pairs@v1/train.jsonl"
        world.spec["data"]["validation"][0]["uri"] = "hf://datasets/org/pairs@v1/held*.jsonl"
        yield running


def test_a_valid_job_shows_its_plan(hub: HubServer, world: World, dpo: Dpo) -> None:
    said = dpo("validate", world.write())
    assert said.code == 0, said.all
    assert "hf://org/tiny (1000 B of weights)" in said.out
    assert "hf://datasets/org/pairs@v1/train.jsonl (1 object" in said.out
    assert "llama · 2 layers" in said.out
    assert "1 epoch of ≈ 100 pairs" in said.out
    assert hub.downloads("model.safetensors") == [], "the weights stay where they are"


def test_an_adapter_of_another_model_of_the_hub(hub: HubServer, world: World, dpo: Dpo) -> None:
    good_adapter(world, base_model_name_or_path="org/other")
    said = dpo("validate", world.write())
    assert said.code == 0, said.all
    assert "warning  spec.model.adapter.uri: the adapter was made for org/other, not for hf://org/tiny;" in said.out
    assert "hf://org/tiny (1000 B of weights)" in said.out
    for base in ("org/tiny", "/models/llama"):
        config = world.folder / "sft" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
        assert "was made for" not in dpo("validate", world.write()).out


def test_what_is_missing_is_named(hub: HubServer, world: World, dpo: Dpo) -> None:
    world.spec["model"]["huggingFace"]["uri"] = "hf://org/tyni"
    world.spec["data"]["train"][0]["uri"] = "hf://datasets/org/pairs@v2/train.jsonl"
    world.spec["data"]["validation"][0]["uri"] = "hf://datasets/org/pairs@v1/heldot.jsonl"
    said = dpo("validate", world.write())
    assert said.code != 0
    assert "hf://org/tyni: no such repository, or it is private and HF_TOKEN may not read it" in said.all
    assert "hf://datasets/org/pairs@v2: the repository has no such revision" in said.all
    assert "did you mean hf://datasets/org/pairs@v1/heldout.jsonl?" in said.all


def test_a_push_by_a_secret_of_the_cluster_is_not_checked_here(hub: HubServer, world: World, dpo: Dpo) -> None:
    world.spec["output"] = {"hub": {"repository": "org/aligned"}}
    world.spec["storage"] = {"hub": {"tokenSecretRef": {"name": "team-hub", "key": "token"}}}
    said = dpo("validate", world.write())
    assert said.code == 0, said.all
    assert "spec.output.hub: the token of Secret team-hub, which may not be read here, is checked when" in said.all
    world.spec["storage"] = {}
    said = dpo("validate", world.write())
    assert said.code == Outcome.AccessDenied.exit_code
    assert "spec.output.hub: hf://org/aligned@main: a push needs an access token, and there is none" in said.all


def test_a_hub_that_is_away_when_the_push_is_checked_is_a_warning(
    hub: HubServer, world: World, dpo: Dpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    monkeypatch.setattr("dpo_cli.survey.PATIENCE", RetryPolicy(attempts=1))
    hub.failures = [Failure("/auth-check/", 503, times=100)]
    world.spec["output"] = {"hub": {"repository": "org/aligned"}}
    said = dpo("validate", world.write())
    assert said.code == 0, said.all
    assert "warning  spec.output.hub: hf://org/aligned@main: the hub is overloaded or failing (HTTP 503)" in said.all


def test_a_client_without_huggingface_hub_accepts_the_job(
    hub: HubServer, world: World, dpo: Dpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails, as where it is not installed
    world.spec["output"] = {"hub": {"repository": "org/aligned"}}
    said = dpo("validate", world.write())
    assert said.code == 0, said.all
    assert "hf://org/aligned@main is not checked here: huggingface_hub is not installed" in said.all
    assert "hf://org/tiny is not checked here: huggingface_hub is not installed" in said.all
    assert hub.seen == []
