"""What Prometheus learns of the operator. Gauges are read off the cache when asked, so they go when a job goes."""

from __future__ import annotations

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
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from dpo_api.version import VERSION
from dpo_operator.runtime import jobseries


class Metrics:
    """The operator's own registry."""

    def __init__(
        self,
        jobs: Callable[[], Iterable[Mapping[str, Any]]],
        gauges: Callable[[], Mapping[str, tuple[str, float]]],
        *,
        job_limit: int,
    ) -> None:
        """``jobs``: the DPOJobs of now. ``gauges``: further gauges, by name: help and value."""
        disable_created_metrics()  # one more series a counter, which no dashboard reads
        self.registry = CollectorRegistry()
        self._passes = Histogram(
            "dpo_operator_reconcile_duration_seconds", "Duration of a pass over one DPOJob.", registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        )  # fmt: skip
        self._errors = Counter(
            "dpo_operator_reconcile_errors", "Passes that failed and are repeated, by cause.", ["cause"],
            registry=self.registry,
        )  # fmt: skip
        for cause in ("unreachable", "unsettled", "exception"):
            self._errors.labels(cause)  # from 0, so that the first one counts
        self._restarts = Counter(
            "dpo_operator_restarts", "Attempts that ended in failure, by class.", ["class"], registry=self.registry
        )
        for name in ("infrastructure", "retryable", "permanent"):
            self._restarts.labels(name)
        ProcessCollector("dpo_operator", registry=self.registry)
        self.registry.register(_OfNow(jobs, gauges, job_limit))

    def text(self) -> bytes:
        """Return everything in Prometheus' text form."""
        return generate_latest(self.registry)

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
                self._restarts.labels(attempt["failureClass"]).inc()


class _OfNow(Collector):
    """Gauges over what the cache holds at the moment of the scrape."""

    def __init__(
        self,
        jobs: Callable[[], Iterable[Mapping[str, Any]]],
        gauges: Callable[[], Mapping[str, tuple[str, float]]],
        limit: int,
    ) -> None:
        self._jobs = jobs
        self._gauges = gauges
        self._limit = limit

    def describe(self) -> Iterable[Metric]:
        return ()  # names without values; else registering would look at the cache

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("dpo_operator", "Always 1; its labels describe the operator.", {"version": VERSION})
        jobs = list(self._jobs())
        yield from jobseries.of_fleet(jobs)
        for name, (text, value) in self._gauges().items():
            yield GaugeMetricFamily(name, text, value=value)
        newest = sorted(jobs, key=lambda job: job["metadata"].get("creationTimestamp") or "", reverse=True)
        yield from jobseries.of_jobs(newest[: self._limit], time.time())
