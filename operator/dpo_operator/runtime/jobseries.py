"""The series about DPOJobs, computed from their statuses at each scrape, so that they survive operator restarts."""

from __future__ import annotations

import heapq
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dpo_api.metrics import ACCURACY, BY_NAME, LOSS, MARGIN, OPERATOR, newest_group
from dpo_api.status import STATES, ConditionType
from dpo_operator import clock
from dpo_operator.runtime.records import Record, Sample

Job = Mapping[str, Any]

_VALUES = {"True": 1.0, "False": 0.0}
_WATCHED = frozenset(
    kind.value
    for kind in (
        ConditionType.ProgressAvailable,
        ConditionType.LayoutVerified,
        ConditionType.ReferenceConsistent,
        ConditionType.Finite,
        ConditionType.Learning,
        ConditionType.TrainingStalled,
        ConditionType.SlowRank,
    )
)
"""The conditions about the run itself; the others add nothing to the state."""
_OF_RUN: tuple[tuple[str, str], ...] = (
    ("dpo_job_accuracy_ratio", ACCURACY),
    ("dpo_job_reward_margin", MARGIN),
    ("dpo_job_loss", LOSS),
)


def of_fleet(jobs: Iterable[Job | Record]) -> Iterator[Metric]:
    """Yield the counts over all DPOJobs, by namespace."""
    states: Tally[tuple[str, str]] = Tally()
    gpus: Tally[str] = Tally()
    for job in jobs:
        if isinstance(job, Record):  # it holds no GPU
            states[job.namespace, job.state] += 1
            gpus[job.namespace] += 0
            continue
        namespace = job["metadata"]["namespace"]
        states[namespace, _state(job)] += 1
        attempts = _status(job).get("attempts") or ()
        gpus[namespace] += _gpus(job) if attempts and _runs(attempts[-1]) else 0
    counted = family("dpo_operator_jobs")
    for namespace in sorted(gpus):
        for state in STATES:
            counted.add_metric([namespace, state], states[namespace, state])
    yield counted
    counted = family("dpo_operator_gpus")
    for namespace, count in sorted(gpus.items()):
        counted.add_metric([namespace], count)
    yield counted


def foremost(jobs: Iterable[Job | Record], limit: int) -> list[Job | Record]:
    """Return the DPOJobs with series of their own: unfinished ones first, then the newest.

    The longest run is the oldest job: it must keep its alerts, however many jobs have finished since it began.
    """

    def rank(job: Job | Record) -> tuple[bool, str]:
        if isinstance(job, Record):
            return False, job.created
        return not _is_over(job), job["metadata"].get("creationTimestamp") or ""

    return heapq.nlargest(limit, jobs, key=rank)


def of_jobs(jobs: Iterable[Job | Record], now: float) -> Iterator[Metric]:
    """Yield the series of each DPOJob. ``now``: Unix seconds."""
    families = {row.name: family(row.name) for row in OPERATOR if row.name.startswith("dpo_job_")}
    for job in jobs:
        if isinstance(job, Record):
            labels, found = [job.namespace, job.name], iter(job.series)
        else:
            labels, found = [job["metadata"]["namespace"], job["metadata"]["name"]], samples(job, now)
        for name, label, value in found:
            families[name].add_metric([*labels, label] if label else labels, value)
    yield from families.values()


def samples(job: Job, now: float) -> Iterator[Sample]:
    """Yield the samples of one DPOJob. Those of a finished one are the same at any time."""
    yield "dpo_job_state", _state(job), 1.0
    for condition in _status(job).get("conditions") or ():
        if condition["type"] in _WATCHED and condition["status"] in _VALUES:
            yield "dpo_job_condition", condition["type"], _VALUES[condition["status"]]
    for name, value in _values(job, now):
        yield name, "", value


def _values(job: Job, now: float) -> Iterator[tuple[str, float]]:
    status = _status(job)
    attempts: Sequence[Mapping[str, Any]] = status.get("attempts") or ()
    yield "dpo_job_attempt", status.get("attempt") or 0
    yield "dpo_job_gpu_seconds_total", _gpus(job) * sum(_ran(attempt, now) for attempt in attempts)
    if attempts and attempts[-1].get("startTime"):
        newest = attempts[-1]
        until = newest.get("runningTime") or newest.get("endTime")
        end = clock.to_moment(until) if until else now
        yield "dpo_job_queue_seconds", max(0.0, end - clock.to_moment(newest["startTime"]))
    progress = status.get("progress") or {}
    if progress.get("step") is not None:
        yield "dpo_job_step", progress["step"]
    values = {**(progress.get("metrics") or {}), **(status.get("finalMetrics") or {})}
    group = newest_group(values)
    for name, key in _OF_RUN:
        value = values.get(f"{group}/{key}")
        if value is not None:
            yield name, value


def family(name: str) -> GaugeMetricFamily | CounterMetricFamily:
    """Return an empty family with the help and labels of its row. KeyError for a name that the table lacks."""
    metric = BY_NAME[name]
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(metric.family, metric.help, labels=metric.labels)


def _status(job: Job) -> Mapping[str, Any]:
    return job.get("status") or {}


def _is_over(job: Job) -> bool:
    return bool(_status(job).get("completionTime")) or _state(job) == "Rejected"


def _state(job: Job) -> str:
    return _status(job).get("state") or "Pending"


def _gpus(job: Job) -> int:
    """GPUs of one attempt. A rejected spec may contain anything."""
    spec = job.get("spec")
    resources = spec.get("resources") if isinstance(spec, Mapping) else None
    if not isinstance(resources, Mapping):
        return 0
    nodes, each = resources.get("nodes", 1), resources.get("gpusPerNode") or 0
    return nodes * each if isinstance(nodes, int) and isinstance(each, int) else 0


def _runs(attempt: Mapping[str, Any]) -> bool:
    return bool(attempt.get("runningTime")) and not attempt.get("endTime")


def _ran(attempt: Mapping[str, Any], now: float) -> float:
    """Seconds from when all pods of an attempt ran until the last one ended."""
    if not attempt.get("runningTime"):
        return 0.0
    end = clock.to_moment(attempt["endTime"]) if attempt.get("endTime") else now
    return max(0.0, end - clock.to_moment(attempt["runningTime"]))
