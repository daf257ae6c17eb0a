"""What the operator tells Prometheus of DPOJobs: made of their statuses alone, whatever they hold."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from dpo_api.metrics import OPERATOR
from dpo_operator import clock
from dpo_operator.config import Settings
from dpo_operator.runtime import jobseries
from dpo_operator.runtime.app import Operator
from dpo_operator.runtime.metrics import Metrics
from dpo_operator.runtime.options import Options
from dpo_operator.runtime.resources import JOBS

NOW = clock.to_moment("2026-01-01T12:00:00Z")

Object = dict[str, Any]


def job(name: str = "j", namespace: str = "a", *, nodes: Any = 2, gpus: Any = 4, **status: Any) -> Object:
    return {
        "metadata": {"namespace": namespace, "name": name, "creationTimestamp": "2026-01-01T10:00:00Z"},
        "spec": {"resources": {"nodes": nodes, "gpusPerNode": gpus}},
        "status": status,
    }


def attempt(number: int, **times: str) -> Object:
    return {"number": number, "child": f"j-{number}"} | {
        name: f"2026-01-01T{value}:00Z" for name, value in times.items()
    }


def values(families: Any) -> dict[tuple[str, ...], float]:
    """By name and labels' values, in the order of the table."""
    found: dict[tuple[str, ...], float] = {}
    for family in families:
        assert isinstance(family, Metric)
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def text(metrics: Metrics) -> str:
    return asyncio.run(metrics.text()).decode()


def of(item: Object) -> dict[tuple[str, ...], float]:
    return values(jobseries.of_jobs([item], NOW))


def test_gpu_time_counts_every_attempt_from_when_it_ran() -> None:
    status = {
        "attempt": 3,
        "attempts": [
            attempt(1, startTime="10:00", runningTime="10:10", endTime="10:40"),
            attempt(2, startTime="10:41", endTime="10:45"),  # its pods never ran
            attempt(3, startTime="11:00", runningTime="11:30"),
        ],
    }
    found = of(job(**status))
    assert found["dpo_job_gpu_seconds_total", "a", "j"] == 8 * (30 + 30) * 60
    assert found["dpo_job_queue_seconds", "a", "j"] == 30 * 60
    assert found["dpo_job_attempt", "a", "j"] == 3


@pytest.mark.parametrize(
    ("times", "minutes"),
    [({"startTime": "11:15"}, 45), ({"startTime": "11:15", "endTime": "11:20"}, 5)],
    ids=["still waiting", "ended before it ran"],
)
def test_queue_time_grows_until_the_attempt_runs_or_ends(times: dict[str, str], minutes: int) -> None:
    assert of(job(attempts=[attempt(1, **times)]))["dpo_job_queue_seconds", "a", "j"] == minutes * 60


def test_a_condition_that_is_unknown_has_no_value() -> None:
    conditions = [
        {"type": "Finite", "status": "True"},
        {"type": "Learning", "status": "Unknown"},
        {"type": "TrainingStalled", "status": "False"},
        {"type": "Accepted", "status": "True"},
    ]
    found = {key[3]: value for key, value in of(job(conditions=conditions)).items() if key[0] == "dpo_job_condition"}
    assert found == {"Finite": 1, "TrainingStalled": 0}


def test_figures_are_validation_s_where_there_is_validation_and_outlive_the_run() -> None:
    item = job(
        state="Succeeded",
        progress={"phase": "train", "step": 7, "metrics": {"train/acc": 0.5, "train/loss": 0.6, "val/acc": 0.7}},
        finalMetrics={"val/acc": 0.8, "val/loss": 0.3, "val/rewards_margin": 1.5},
    )
    found = of(item)
    assert found["dpo_job_state", "a", "j", "Succeeded"] == 1
    assert found["dpo_job_step", "a", "j"] == 7
    assert found["dpo_job_accuracy_ratio", "a", "j"] == 0.8
    assert found["dpo_job_loss", "a", "j"] == 0.3
    assert found["dpo_job_reward_margin", "a", "j"] == 1.5


def test_jobs_and_gpus_are_counted_by_namespace() -> None:
    running = [attempt(1, startTime="10:00", runningTime="10:10")]
    over = [attempt(1, startTime="10:00", runningTime="10:10", endTime="10:30")]
    jobs = [
        job("j1", state="Running", attempts=running),
        job("j2", state="Running", attempts=running, nodes=1, gpus=1),
        job("j3", state="Succeeded", attempts=over),
        job("j4", "b"),
    ]
    found = values(jobseries.of_fleet(jobs))
    assert found["dpo_operator_jobs", "a", "Running"] == 2
    assert found["dpo_operator_jobs", "a", "Failed"] == 0
    assert found["dpo_operator_jobs", "b", "Pending"] == 1
    assert found["dpo_operator_gpus", "a"] == 9
    assert found["dpo_operator_gpus", "b"] == 0


@pytest.mark.parametrize("resources", [None, 3, {}, {"nodes": "two", "gpusPerNode": 8}, {"gpusPerNode": None}])
def test_a_spec_that_was_refused_may_hold_anything(resources: object) -> None:
    item = {**job(state="Rejected"), "spec": {"resources": resources}}
    assert of(item)["dpo_job_gpu_seconds_total", "a", "j"] == 0
    assert values(jobseries.of_fleet([item]))["dpo_operator_gpus", "a"] == 0
    assert of({"metadata": item["metadata"]})["dpo_job_state", "a", "j", "Pending"] == 1


def test_the_operator_exports_exactly_the_rows_of_the_table() -> None:
    """Wired as the process wires it, without a cluster: names, types, labels and help texts."""
    status = {
        "state": "Running",
        "attempt": 1,
        "attempts": [attempt(1, startTime="10:00", runningTime="10:10")],
        "conditions": [{"type": "Finite", "status": "True"}],
        "progress": {
            "step": 1,
            "metrics": {"train/acc": 1.0, "train/loss": 0.1, "train/rewards_margin": 0.2},
        },
    }
    operator = Operator(Options(), Settings())
    item = job(**status)
    operator._cache.put(JOBS, {**item, "metadata": {**item["metadata"], "uid": "1"}}, watched=False)
    operator.health.checked_at = NOW
    rows = {row.family: row for row in OPERATOR}
    families = {family.name: family for family in text_string_to_metric_families(text(operator._metrics))}
    assert set(families) == set(rows)
    for name, family in families.items():
        row = rows[name]
        assert (family.type, family.documentation) == (row.kind, row.help), name
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(row.labels), sample
        assert row.kind == "histogram" or {sample.name for sample in family.samples} == {row.name}


def test_only_the_newest_jobs_have_series_of_their_own() -> None:
    old, new = job("old"), job("new")
    new["metadata"]["creationTimestamp"] = "2026-01-01T11:00:00Z"
    found = text(Metrics(lambda: [old, new], dict, job_limit=1))
    assert 'dpo_job_state{dpojob="new"' in found
    assert 'dpojob="old"' not in found
    assert 'dpo_operator_jobs{namespace="a",state="Pending"} 2.0' in found


def test_a_long_run_keeps_its_series_however_many_younger_jobs_have_finished() -> None:
    """Otherwise the alerts of the longest run would fall silent first."""
    running = job("three-weeks", state="Running")
    running["metadata"]["creationTimestamp"] = "2025-12-01T00:00:00Z"
    finished = [
        job("done", state="Succeeded", completionTime="2026-01-01T11:00:00Z"),
        job("failed", state="Failed", completionTime="2026-01-01T11:00:00Z"),
        job("rejected", state="Rejected"),
    ]
    found = text(Metrics(lambda: [*finished, running], dict, job_limit=1))
    assert 'dpo_job_state{dpojob="three-weeks"' in found
    assert not [item for item in finished if f'dpojob="{item["metadata"]["name"]}"' in found]


def test_the_text_is_made_beside_the_event_loop() -> None:
    """A thousand jobs take a tenth of a second, in which no pass could run and no probe be answered."""
    read_in: list[str] = []

    class Watched(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            read_in.append(threading.current_thread().name)
            return super().__getitem__(name)

    found = text(Metrics(lambda: [Watched(job(state="Running"))], dict, job_limit=1))
    assert 'dpo_job_state{dpojob="j"' in found
    assert read_in
    assert threading.current_thread().name not in read_in


def test_failed_passes_are_counted_from_zero() -> None:
    assert 'dpo_operator_reconcile_errors_total{cause="exception"} 0.0' in text(Metrics(list, dict, job_limit=1))
