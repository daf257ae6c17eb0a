"""MLflow tracking. Credentials come from the environment (``MLFLOW_TRACKING_TOKEN``), never from a spec."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from dpo_api.errors import InvalidSpecError, Outcome
from dpo_trainer.metrics.writer import Background, run_id

UPLOAD_SECONDS = 5.0
"""Minimum time between two uploads."""

RUN_DIRECTORY = "dpo.run_directory_id"
"""Tag by which later attempts find the run: a hash, since the address of a run directory is nobody else's concern."""

_DEFAULT_EXPERIMENT = "Default"
_METRICS_AT_ONCE, _PARAMS_AT_ONCE, _VALUE_MAX = 1000, 100, 6000  # MLflow's limits

_ENDS = {Outcome.Succeeded: "FINISHED", Outcome.Stopped: "KILLED"}
"""MLflow's status of a run by its outcome; FAILED for all others."""

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # the library would report its use to its makers
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # what is not uploaded is tried again with what follows
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}


class MlflowSettings(Protocol):
    """The fields of a spec's ``logging.mlflow`` that are used here; see dpo_api.spec."""

    @property
    def tracking_uri(self) -> str: ...  # noqa: D102
    @property
    def experiment(self) -> str | None: ...  # noqa: D102
    @property
    def run_name(self) -> str | None: ...  # noqa: D102


def check() -> None:
    """Raise InvalidSpecError when the package is missing."""
    if find_spec("mlflow") is None:
        raise InvalidSpecError(
            "spec.logging.mlflow: the mlflow package is not installed here; install mlflow-skinny or remove the section"
        )


class MlflowWriter:
    """One MLflow run per run directory. Every attempt continues it; steps that it has already are not repeated.

    All requests are made in a thread. While the server is away, events wait in memory, about 500 bytes each.
    """

    outcome = Outcome.Succeeded
    """How the run ended, for ``close``."""

    def __init__(
        self,
        settings: MlflowSettings,
        *,
        job: str,
        run_dir: str,
        params: Mapping[str, Any],
        interval: float = UPLOAD_SECONDS,
    ) -> None:
        """Return at once; the run is started or continued by the first upload. params: shown beside the curves."""
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        self._settings, self._job, self._id = settings, job, run_id(run_dir)
        self._params = dict(flattened(params))
        self._events: list[tuple[int, int, dict[str, float]]] = []
        self._lock = threading.Lock()
        self._client: Any = None
        self._run = ""
        self._known: dict[str, int] = {}  #: group → last step that the run had before this attempt
        self._upload = Background(f"MLflow at {settings.tracking_uri}", self._put, interval)
        self._upload.request()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See MetricsWriter."""
        with self._lock:
            self._events.append((int(time.time() * 1000), step, dict(metrics)))
        self._upload.request()

    def flush(self) -> None:
        """Do nothing: a step or a checkpoint does not wait for a service."""

    def close(self) -> None:
        """Upload the rest and end the run; takes at most about a minute if the server is away."""
        self._upload.finish()
        self._client.set_terminated(self._run, _ENDS.get(self.outcome, "FAILED"))

    def _put(self) -> None:
        if not self._run:
            self._open()
        from mlflow.entities import Metric

        with self._lock:
            events = list(self._events)
        found = [
            Metric(name, value, at, step)
            for at, step, metrics in events
            for name, value in metrics.items()
            if step > self._known.get(name.partition("/")[0], -1)
        ]
        for first in range(0, len(found), _METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=found[first : first + _METRICS_AT_ONCE])
        with self._lock:
            del self._events[: len(events)]

    def _open(self) -> None:
        """Continue the run directory's run, or start it."""
        from mlflow import MlflowClient

        client = self._client = MlflowClient(tracking_uri=self._settings.tracking_uri)
        experiment = _experiment(client, self._settings.experiment or _DEFAULT_EXPERIMENT)
        there = client.search_runs([experiment], f"tags.`{RUN_DIRECTORY}` = '{self._id}'", max_results=1)
        if there:
            run = there[0].info.run_id
            client.update_run(run, status="RUNNING")
            self._known = dict(_last_steps(client, run, there[0].data.metrics))
        else:
            name = self._settings.run_name or self._job
            run = client.create_run(experiment, tags={RUN_DIRECTORY: self._id}, run_name=name).info.run_id
            self._log_params(client, run)
        self._run = run

    def _log_params(self, client: Any, run: str) -> None:
        from mlflow.entities import Param

        params = [Param(name, text[:_VALUE_MAX]) for name, text in self._params.items()]
        for first in range(0, len(params), _PARAMS_AT_ONCE):
            client.log_batch(run, params=params[first : first + _PARAMS_AT_ONCE])


def _experiment(client: Any, name: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another run may have created it meanwhile
            if found is None:
                raise
    return str(found.experiment_id)


def _last_steps(client: Any, run: str, names: Mapping[str, float]) -> Iterator[tuple[str, int]]:
    """Yield each group of metrics with the last step that the run has of it, by one metric of the group."""
    one = {name.partition("/")[0]: name for name in sorted(names)}
    for group, name in one.items():
        yield group, max(metric.step for metric in client.get_metric_history(run, name))


def flattened(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each setting as a path and a text, such as ``data.train.0.uri``."""
    for name, value in settings.items():
        where = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from flattened(value, where)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield from flattened({str(index): item for index, item in enumerate(value)}, where)
        else:
            yield where, str(value)
