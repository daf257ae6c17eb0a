"""The operator's /metrics, built from the rows of dpo_api.metrics.

Gauges about jobs are read from the cache at each scrape, so they disappear with their job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dpo_api.metrics import BY_NAME
from dpo_api.version import VERSION
from dpo_operator.reasons import Reason
from dpo_operator.runtime import jobseries
from dpo_operator.runtime.records import Record

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds of a reconcile."""


class Metrics:
    """The operator's own registry."""

    def __init__(
        self,
        jobs: Callable[[], Iterable[Mapping[str, Any] | Record]],
        gauges: Callable[[], Mapping[str, float]],
        *,
        job_limit: int,
    ) -> None:
        """``jobs``: the current DPOJobs. ``gauges``: the current value of further gauges, by name."""
        disable_created_metrics()  # one more series per counter, which no dashboard reads
        self.registry = CollectorRegistry()
        duration = BY_NAME["dpo_operator_reconcile_duration_seconds"]
        self._passes = Histogram(duration.family, duration.help, registry=self.registry, buckets=_BUCKETS)
        self._errors = self._counter("dpo_operator_reconcile_errors_total")
        for cause in ("unreachable", "unsettled", "exception"):
            self._errors.labels(cause)  # from 0, so that the first one counts
        self._restarts = self._counter("dpo_operator_restarts_total")
        for reason in Reason:
            if reason.topic == "cause":
                self._restarts.labels(reason.retry, reason.value)
        self.registry.register(_Process())
        self._jobs = jobs
        self._gauges = gauges
        self._job_limit = job_limit

    def _counter(self, name: str) -> Counter:
        row = BY_NAME[name]
        return Counter(row.family, row.help, row.labels, registry=self.registry)

    async def text(self) -> bytes:
        """Return everything in Prometheus' text form.

        The text of a thousand jobs takes a tenth of a second, in which no pass could run. So only the references are
        read here, and a thread makes the text; no object of the cache is changed after it was put there.
        """
        now = _Now(self.registry, list(self._jobs()), dict(self._gauges()), self._job_limit)
        return await asyncio.to_thread(generate_latest, now)

    @contextlib.contextmanager
    def pass_time(self) -> Iterator[None]:
        """Measure a pass."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._passes.observe(time.perf_counter() - start)

    def error(self, cause: str) -> None:
        """Count a pass that failed."""
        self._errors.labels(cause).inc()

    def transition(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Count the attempts that failed between two statuses of a job."""
        known = {a["number"] for a in before.get("attempts") or () if a.get("failureClass")}
        for attempt in after.get("attempts") or ():
            if attempt.get("failureClass") and attempt["number"] not in known:
                self._restarts.labels(attempt["failureClass"], attempt.get("reason") or Reason.Internal.value).inc()


class _Process(Collector):
    """Memory, CPU time and files of this process, as prometheus_client measures them, with the table's help texts."""

    def __init__(self) -> None:
        self._collector = ProcessCollector("dpo_operator", registry=None)

    def collect(self) -> Iterator[Metric]:
        for family in self._collector.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            family.documentation = BY_NAME[name].help
            yield family


class _Now(Collector):
    """The registry, and what the cache and the process held at one moment."""

    def __init__(
        self, registry: CollectorRegistry, jobs: list[Mapping[str, Any] | Record], gauges: dict[str, float], limit: int
    ) -> None:
        self._registry = registry
        self._jobs = jobs
        self._gauges = gauges
        self._limit = limit

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        info = jobseries.family("dpo_operator_info")
        info.add_metric([VERSION], 1)
        yield info
        yield from jobseries.of_fleet(self._jobs)
        for name, value in self._gauges.items():
            yield GaugeMetricFamily(name, BY_NAME[name].help, value=value)
        yield from jobseries.of_jobs(jobseries.foremost(self._jobs, self._limit), time.time())
