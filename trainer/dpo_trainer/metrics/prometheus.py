"""The run's metrics in Prometheus' format, built from the rows of dpo_api.metrics."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dpo_api.metrics import BY_KEY, BY_NAME, METRICS
from dpo_trainer.metrics.writer import without_meaningless


class PrometheusMetrics(Collector):
    """The newest value of every series in the table. A series without a value is absent, not 0.

    Thread-safe. Also a MetricsWriter: events set the series that have a key in metrics.jsonl. NaN is kept, so that an
    alert can see it.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._now = now
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self.registry.register(self)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the series of one event and the time of the newest training step or validation."""
        values = {key: value for key, value in without_meaningless(step, metrics).items() if key in BY_KEY}
        groups = {key.partition("/")[0] for key in metrics}
        with self._lock:
            for key, value in values.items():
                self._put(BY_KEY[key].name, (), value)
            if "train" in groups:
                self._put(BY_KEY["step"].name, (), step)
                self._put("dpo_train_last_step_timestamp_seconds", (), self._now())
            if "val" in groups:
                self._put("dpo_val_last_run_timestamp_seconds", (), self._now())

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set one series by its Prometheus name. KeyError for a name or a label that the table lacks."""
        with self._lock:
            self._put(name, self._labels(name, labels), value)

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter, from 0."""
        if BY_NAME[name].kind != "counter" or amount < 0:
            raise ValueError(f"{name} is not a counter, or {amount} is negative")
        with self._lock:
            series = self._labels(name, labels)
            self._put(name, series, self._values.get(name, {}).get(series, 0.0) + amount)

    def clear(self, name: str) -> None:
        """Remove a metric with all its series."""
        with self._lock:
            self._values.pop(name, None)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        """Do nothing: values stay readable until the server stops."""

    def collect(self) -> Iterator[Metric]:
        """Yield the families that have a value, in the table's order."""
        with self._lock:
            values = {name: dict(series) for name, series in self._values.items()}
        for metric in METRICS:
            if metric.name not in values:
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.family, metric.help, labels=metric.labels)
            for series, value in values[metric.name].items():
                family.add_metric(series, value)
            yield family

    def _put(self, name: str, series: tuple[str, ...], value: float) -> None:
        self._values.setdefault(name, {})[series] = float(value)

    @staticmethod
    def _labels(name: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        wanted = BY_NAME[name].labels
        if set(labels) != set(wanted):
            raise KeyError(f"{name} has the labels {list(wanted)}, not {list(labels)}")
        return tuple(labels[label] for label in wanted)
