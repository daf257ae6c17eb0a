"""MLflow, by its own tracking server."""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import InvalidSpecError, Outcome
from dpo_api.spec import Mlflow
from dpo_store import open_store
from dpo_testing.mlflowserver import MlflowServer
from dpo_testing.runs import job_of, merged, run_here
from dpo_testing.s3server import free_port
from dpo_testing.training_world import make
from dpo_trainer.metrics import mlflow
from dpo_trainer.metrics.hub import Hub
from dpo_trainer.metrics.mlflow import MlflowWriter

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mlflow")]

SPEC = {"model": {"huggingFace": {"uri": "/models/a"}}, "data": {"train": [{"uri": "/data/a.jsonl"}]}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)


def writer(server: MlflowServer, experiment: str, run_dir: str = "s3://runs/a", **more: Any) -> MlflowWriter:
    settings = Mlflow(tracking_uri=server.uri, experiment=experiment)
    params = {"dpo": {"beta": 0.1}, "data": {"train": [{"uri": "s3://a"}], "maxLength": 64}} | more
    return MlflowWriter(settings, job="demo", run_dir=run_dir, params=params, interval=0.05)


def runs_of(server: MlflowServer, experiment: str) -> list[Any]:
    client = server.client()
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def history(server: MlflowServer, run: Any, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in server.client().get_metric_history(run.info.run_id, name)]


def test_each_attempt_continues_the_run_and_repeats_no_step(server: MlflowServer) -> None:
    first = writer(server, "attempts")
    first.write(0, {"val/loss": 0.69})
    for step in (1, 2, 3):
        first.write(step, {"train/loss": 1 / step, "train/acc": 0.5})
    first.outcome = Outcome.Stopped
    first.close()
    (run,) = runs_of(server, "attempts")
    assert (run.info.run_name, run.info.status) == ("demo", "KILLED")
    assert run.data.params == {"dpo.beta": "0.1", "data.train.0.uri": "s3://a", "data.maxLength": "64"}
    second = writer(server, "attempts", "s3://runs/a/", seed=7)  # params of the first attempt stay
    for step in (3, 4):
        second.write(step, {"train/loss": 1 / step})
    second.write(4, {"val/loss": math.nan})
    second.close()
    (run,) = runs_of(server, "attempts")
    assert run.info.status == "FINISHED"
    assert "seed" not in run.data.params
    assert history(server, run, "train/loss") == [(step, 1 / step) for step in (1, 2, 3, 4)]
    (before, after) = history(server, run, "val/loss")
    assert before == (0, 0.69)
    assert after[0] == 4
    assert math.isnan(after[1])


def test_another_run_directory_is_another_run(server: MlflowServer) -> None:
    for name in ("a", "b"):
        made = writer(server, "directories", f"s3://runs/{name}")
        made.outcome = Outcome.NonFinite
        made.close()
    found = runs_of(server, "directories")
    assert [run.info.status for run in found] == ["FAILED", "FAILED"]
    assert "s3://runs" not in str([run.data.tags for run in found])


def test_more_than_a_request_holds(server: MlflowServer) -> None:
    many = {f"train/m{i}": float(i) for i in range(1200)}
    made = writer(server, "many", **{f"p{i}": "x" * 7000 for i in range(120)})
    made.write(1, many)
    made.close()
    (run,) = runs_of(server, "many")
    assert run.data.metrics == many
    assert len(run.data.params) == 123


def test_what_was_measured_while_the_server_was_away_follows(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.away()
    with caplog.at_level(logging.WARNING):
        made = writer(server, "away")
        made.write(1, {"train/loss": 0.5})
        while not caplog.records:
            time.sleep(0.01)
        made.write(2, {"train/loss": 0.25})
        server.away(False)
        made.close()
    (run,) = runs_of(server, "away")
    assert history(server, run, "train/loss") == [(1, 0.5), (2, 0.25)]
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("dpo_trainer")]
    assert said.startswith(f"MLflow at {server.uri} cannot be written")


def test_a_token_comes_from_the_environment_and_is_nowhere_else(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.require("right-token")
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "wrong-token")
        made = writer(server, "token")
        with pytest.raises(Exception, match="401") as refused:
            made.close()
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "right-token")
        made = writer(server, "token")
        made.write(1, {"train/loss": 0.5})
        made.close()
        (run,) = runs_of(server, "token")
    finally:
        server.require(None)
    assert history(server, run, "train/loss") == [(1, 0.5)]
    assert "-token" not in caplog.text + str(refused.value) + str(run.data.to_dictionary())


def test_a_run_trains_without_a_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub = Hub(job_of({**SPEC, "logging": {"mlflow": {"trackingURI": f"http://127.0.0.1:{free_port()}"}}}))
    hub.open_sinks(open_store(), str(tmp_path), attempt=1, resume_step=None)
    hub.write(1, {"train/loss": 0.5})
    hub.flush()
    hub.close(Outcome.Succeeded)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 0.5}\n'
    ours = [record for record in caplog.records if record.name.startswith("dpo_trainer")]
    assert any("MLflow" in record.getMessage() for record in ours)


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "find_spec", lambda _: None)
    with pytest.raises(InvalidSpecError, match=r"spec\.logging\.mlflow: the mlflow package is not installed here"):
        Hub(job_of({**SPEC, "logging": {"mlflow": {"trackingURI": "http://mlflow"}}}))


def test_a_run_and_its_continuation_are_one(server: MlflowServer, tmp_path: Path) -> None:
    logged = {"mlflow": {"trackingURI": server.uri, "experiment": "whole", "runName": "two parts"}}
    spec = merged(make(tmp_path), {"logging": logged})
    for steps in (5, 8):
        run = run_here(merged(spec, {"training": {"maxSteps": steps}}), tmp_path / "run")
    (found,) = runs_of(server, "whole")
    assert (found.info.run_name, found.info.status) == ("two parts", "FINISHED")
    assert found.data.params["training.maxSteps"] == "5"
    for name in ("train/loss", "train/rewards_margin", "val/loss"):
        expected = [(event["step"], event[name]) for event in run.events if name in event]
        assert history(server, found, name) == expected
