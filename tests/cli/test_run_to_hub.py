"""`dpo run` that pushes its model to the Hugging Face Hub: a small local server that speaks the hub's calls."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_testing.command import Command, only_error
from dpo_testing.hubserver import Failure, HubServer, hub_server
from dpo_testing.runs import merged
from dpo_testing.training_world import LORA, make

pytestmark = pytest.mark.slow
SHORT = {"training": {"maxSteps": 2, "validationInterval": 2}, "checkpoint": {"everySteps": 2}}
RIGHT = "hf_right"
PUSH = {"output": {"hub": {"repository": "org/aligned"}}}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server(token="hf_right") as running:
        yield running


def command(hub: HubServer, folder: Path, token: str = RIGHT) -> Command:
    return Command(folder, {**hub.environment(folder / "home"), "HF_TOKEN": token})


def world(folder: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    return functools.reduce(merged, (SHORT, *changes), make(folder / "made"))


def below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_pushed_once_and_read_back(hub: HubServer, tmp_path: Path) -> None:
    spec = world(tmp_path, PUSH, LORA, SHORT)
    dpo = command(hub, tmp_path)
    said = dpo("run", "-f", dpo.write(spec), "--processes", "2")
    assert said.code == 0, said.all
    run, commit = tmp_path / "runs" / "tiny", hub.branches["org/aligned", "main"]
    assert "push to     hf://org/aligned@main" in dpo("validate", "job.yaml").out
    assert f"hub         hf://org/aligned@{commit}" in said.out
    pushed = {path: data for path, data in hub.files("org/aligned").items() if path != ".gitattributes"}
    assert pushed == below(run / "model")
    assert {"README.md", "tokenizer.json", "adapter/adapter_config.json", "adapter/README.md"} <= set(pushed)
    assert hub.titles == ["tiny, step 2"]
    assert hub.private["org/aligned"]
    assert json.loads((run / "summary.json").read_text())["hubUri"] == f"hf://org/aligned@{commit}"
    assert f"pushed to hf://org/aligned@{commit}" in (run / "report.html").read_text()
    everything = b"".join(below(run).values()) + b"".join(pushed.values()) + said.all.encode()
    assert b"hf_right" not in everything

    hub.seen.clear()
    again = dpo("run", "-f", dpo.write(spec), "--processes", "2")
    assert again.code == 0, again.all
    assert f"hub         hf://org/aligned@{commit}" in again.out
    assert [path for method, path, _ in hub.seen if method != "GET"] == [], "nothing is pushed again"

    reread = {"model": {"huggingFace": {"uri": f"hf://org/aligned@{commit}"}}, "output": {"hub": None}}
    more = dpo("run", "-f", dpo.write(merged(spec, reread), name="next"))
    assert more.code == 0, more.all


def test_a_failed_push_keeps_the_model_and_the_next_run_only_pushes(hub: HubServer, tmp_path: Path) -> None:
    spec = world(tmp_path, PUSH)
    dpo = command(hub, tmp_path)
    hub.failures = [Failure("POST .*/commit/", 403)]
    said = dpo("run", "-f", dpo.write(spec))
    assert said.code == Outcome.AccessDenied.exit_code
    run = tmp_path / "runs" / "tiny"
    assert only_error(said, Outcome.AccessDenied).startswith(
        "error  the model is whole in runs/tiny/model, but it was not pushed: hf://org/aligned@main: the token may"
    )
    assert "model       runs/tiny/model" in said.out
    assert (run / "export.json").is_file()
    assert hub.titles == []

    before = below(run / "model")
    log = (run / "metrics.jsonl").read_bytes()
    # Another place does not make it another run.
    again = dpo("run", "-f", dpo.write(merged(spec, {"output": {"hub": {"revision": "v2"}}})))
    assert again.code == 0, again.all
    assert "loading the model" not in again.all
    assert "this run was already finished: nothing was trained" in again.out
    assert (run / "metrics.jsonl").read_bytes() == log
    assert before == below(run / "model")
    assert {path: data for path, data in hub.files("org/aligned", "v2").items() if path != ".gitattributes"} == before


def test_an_adapter_alone_is_at_the_top_of_the_repository(hub: HubServer, tmp_path: Path) -> None:
    spec = world(tmp_path, LORA, SHORT, PUSH, {"output": {"merge": False, "formats": ["peft"]}})
    dpo = command(hub, tmp_path)
    hub.push("org/aligned", {"notes.md": b"mine"})
    said = dpo("run", "-f", dpo.write(spec))
    assert said.code == 0, said.all
    adapter = below(tmp_path / "runs" / "tiny" / "model" / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(adapter)
    assert hub.files("org/aligned") == {"notes.md": b"mine", **adapter}


@pytest.mark.parametrize(
    ("token", "repository", "why"),
    [
        ("hf_wrong", "org/aligned", "the hub refuses the token; check HF_TOKEN"),
        ("hf_right", "other/aligned", "its account tester is not other or a member of it, so it cannot create it"),
        ("hf_right", "other/there", "the token may not write to this repository; give it write access"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_training(
    hub: HubServer, tmp_path: Path, token: str, repository: str, why: str
) -> None:
    hub.push("other/there", {"README.md": b""})
    dpo = command(hub, tmp_path, token)
    file = dpo.write(world(tmp_path, {"output": {"hub": {"repository": repository}}}))
    for words in (("run", "-f", file), ("validate", file)):
        said = dpo(*words)
        assert said.code == Outcome.AccessDenied.exit_code, said.all
        assert "spec.output.hub" in said.all
        assert why in said.all
        assert token not in said.all
    assert not (tmp_path / "runs").exists()
    assert hub.knows("org/aligned") is False
