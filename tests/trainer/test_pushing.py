"""What of a run's model is pushed to the hub, and how often: against a small local server that speaks its calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import AccessDeniedError, FencedError, StoppedError
from dpo_api.manifest import DPOJob
from dpo_api.spec import OutputHub
from dpo_store import join_uri, open_store
from dpo_testing.faults import Pauses
from dpo_testing.hubserver import Failure, HubServer, signed_in
from dpo_testing.runs import job_of
from dpo_testing.training_world import make, merged
from dpo_trainer.distributed import World
from dpo_trainer.pushing import files_of, prepare, push, pushed_before
from dpo_trainer.run import Run, RunOptions
from dpo_trainer.rundir import EXPORT, RunDirectory
from dpo_trainer.stopping import StopRequest

SPEC: dict[str, Any] = {
    "model": {"huggingFace": {"uri": "s3://models/llama/"}},
    "data": {"train": [{"uri": "s3://prefs/a.jsonl"}]},
    "output": {"hub": {"repository": "org/aligned"}},
}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
TOP = {*SHARDS, "README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
OTHERS = {"notes.txt", "model.nemo", "secrets.json", "megatron/latest.txt", "adapter/notes.txt", "old/config.json"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with signed_in(tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run directory with an export."""
    model = tmp_path / "run" / "model"
    for name in [*TOP, *OTHERS, *(f"adapter/{name}" for name in ADAPTER)]:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(f"of {name}\n")
    directory = RunDirectory(open_store(), str(tmp_path / "run"))
    directory.write_json(EXPORT, {"step": 4})
    return directory


def place(run: RunDirectory) -> tuple[Any, str]:
    return run.store, join_uri(run.uri, "model")


def pushed(run: RunDirectory, spec: dict[str, Any]) -> str:
    return push(run, job_of(spec).spec, place(run), title="step 4", progress=lambda _: None)


def target(spec: dict[str, Any]) -> OutputHub:
    found = job_of(spec).spec.output.hub
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({}, TOP),
        ({"lora": {}}, TOP | {f"adapter/{name}" for name in ADAPTER}),
        ({"lora": {}, "output": {"formats": ["huggingFace"]}}, TOP),
        ({"lora": {}, "output": {"merge": False}}, ADAPTER),
        ({"lora": {}, "output": {"formats": ["peft"]}}, ADAPTER),
    ],
)
def test_what_the_export_wrote_and_nothing_else(run: RunDirectory, more: dict[str, Any], names: set[str]) -> None:
    found = files_of(job_of({**SPEC, **more}).spec, place(run))
    assert set(found) == names
    below = "adapter/" if names == ADAPTER else ""
    assert {path: run.store.read(info) for path, info in found.items()} == {
        path: f"of {below}{path}\n".encode() for path in names
    }


def test_the_remains_of_an_earlier_model_go(hub: HubServer, run: RunDirectory) -> None:
    left = {"model.safetensors", "model-00003-of-00003.safetensors", "adapter_config.json"}
    left |= {"adapter/adapter_model.safetensors"}
    hub.push("org/aligned", dict.fromkeys([*left, "images/plot.png", "original/model.bin"], b"old"))
    pushed(run, SPEC)
    assert set(hub.files("org/aligned")) == TOP | {"images/plot.png", "original/model.bin"}


def test_an_adapter_leaves_the_model_that_lies_beside_it(hub: HubServer, run: RunDirectory) -> None:
    hub.push("org/aligned", {"model.safetensors": b"base"})
    pushed(run, {**SPEC, "lora": {}, "output": {**SPEC["output"], "merge": False}})
    assert set(hub.files("org/aligned")) == ADAPTER | {"model.safetensors"}


def test_a_push_is_noted_until_there_is_another_export_or_place(
    hub: HubServer, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = target(SPEC), target({**SPEC, "output": {"hub": {"repository": "org/b"}}})
    prepare(here, pytest.fail)
    assert pushed_before(run, here) is None
    address = pushed(run, SPEC)
    assert address == f"hf://org/aligned@{hub.branches['org/aligned', 'main']}"
    assert (pushed_before(run, here), pushed_before(run, other)) == (address, None)
    run.write_json(EXPORT, {"step": 8})
    assert pushed_before(run, here) is None
    assert pushed(run, SPEC) == address, "the branch holds the same"
    assert hub.titles == ["step 4"]
    monkeypatch.setenv("HF_ENDPOINT", "https://another.example")
    assert pushed_before(run, here) is None


def test_a_hub_that_is_away_at_the_start_is_a_warning(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failures = [Failure("", 503, times=1000)]
    said: list[str] = []
    prepare(target(SPEC), said.append, Pauses().timing())
    assert len(said) == 1
    assert said[0].startswith("the push at the end could not be checked: hf://org/aligned@main: the hub is overloaded")
    hub.failures = []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AccessDeniedError, match="the hub refuses the token"):
        prepare(target(SPEC), pytest.fail)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DPOJob:
    """One step, and a push."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    spec = make(tmp_path, pairs=4, validation=1)
    return job_of(merged(spec, {"training": {"maxSteps": 1}, "checkpoint": None, "output": SPEC["output"]}))


def execute(job: DPOJob, folder: Path, stop: StopRequest) -> Run:
    world = World.join(seed=1)
    try:
        run = Run(job, world, stop, RunOptions(run_dir=str(folder)))
        run.execute()
        return run
    finally:
        world.leave()


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_while_it_pushes(hub: HubServer, job: DPOJob, tmp_path: Path) -> None:
    stop, out = StopRequest(), tmp_path / "out"

    def heard(request: str) -> None:
        stop.signalled |= request.startswith("PUT /lfs/")

    hub.heard = heard
    with pytest.raises(StoppedError, match=r"the model is whole in .*out/model, but it was not pushed: asked to stop"):
        execute(job, out, stop)
    assert hub.titles == []
    metrics = (out / "metrics.jsonl").read_bytes()
    hub.heard = lambda _: None
    run = execute(job, out, StopRequest(limit_seconds=0))  # which is for the training
    assert run.hub_uri == f"hf://org/aligned@{hub.branches['org/aligned', 'main']}"
    assert hub.titles == ["test, step 1"]
    assert (out / "metrics.jsonl").read_bytes() == metrics, "nothing is trained again"


@pytest.mark.slow
def test_a_run_that_another_attempt_has_replaced_pushes_nothing(hub: HubServer, job: DPOJob, tmp_path: Path) -> None:
    def heard(request: str) -> None:
        if request.startswith("PUT /lfs/"):
            (tmp_path / "out" / "attempt").write_text('{"attempt": 99, "owner": "another"}')

    hub.heard = heard
    with pytest.raises(FencedError, match=r"it was not pushed: attempt 99 owns the run directory"):
        execute(job, tmp_path / "out", StopRequest())
    assert hub.titles == []
