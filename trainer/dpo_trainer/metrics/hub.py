"""Rank 0's outputs, opened from the spec: the metrics record, Prometheus, TensorBoard, W&B, MLflow and progress."""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_api.errors import DPOError, Outcome
from dpo_api.manifest import DPOJob
from dpo_api.version import VERSION
from dpo_store import Store, join_uri, local_path_of
from dpo_store.revisions import repositories
from dpo_trainer.metrics import mlflow, tensorboard, wandb
from dpo_trainer.metrics.credentials import Credentials
from dpo_trainer.metrics.jsonl import LocalLog, ObjectLog
from dpo_trainer.metrics.progress import ProgressTracker
from dpo_trainer.metrics.prometheus import PrometheusMetrics
from dpo_trainer.metrics.server import StatusServer
from dpo_trainer.metrics.writer import Guarded, MetricsWriter, Writers, summary

log = logging.getLogger(__name__)


class Hub:
    """Rank 0's outputs: ``progress`` and ``prometheus`` from the start, the other writers after ``open_sinks``.

    There are two stages because /status must answer while the model loads, but the record can only be continued once
    the checkpoint's step is known.
    """

    def __init__(self, job: DPOJob, *, port: int | None = None, host: str = "", events: Path | None = None) -> None:
        """Start the server and check what the spec's sinks need.

        port: of /metrics, /status and /healthz on ``host`` (empty: all addresses); None: no server; 0: a free port.
        events: file that `dpo run` follows. Raises PortInUseError; AccessDeniedError for credentials that cannot be
        used; InvalidSpecError and AccessDeniedError for a sink that cannot work with its settings.
        """
        self._job = job
        logging_spec = job.spec.logging
        if logging_spec.tensorboard.enabled:
            tensorboard.check()
        if logging_spec.wandb is not None:
            wandb.check(logging_spec.wandb)
        if logging_spec.mlflow is not None:
            mlflow.check()
        self.prometheus = PrometheusMetrics()
        self._server = (
            None if port is None else StatusServer(self.prometheus.registry, port, host, Credentials.of(os.environ))
        )
        self.progress = ProgressTracker(events, self._server)
        self._writers = Writers([self.prometheus])
        self._mlflow: mlflow.MlflowWriter | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._closed = False

    @property
    def port(self) -> int | None:
        """The server's port; None without a server."""
        return None if self._server is None else self._server.port

    def begin(self, attempt: int, layout: str = "") -> None:
        """Report the attempt's number, its layout, and the commits of inputs on the Hugging Face Hub."""
        self.progress.begin(attempt, layout, repositories(self._job.spec))
        self.prometheus.clear("dpo_trainer_info")
        self.prometheus.set("dpo_trainer_info", 1, version=VERSION, dpojob=self._job.metadata.name)

    def open_sinks(self, store: Store, run_dir: str, *, attempt: int, resume_step: int | None) -> None:
        """Open the run's record and the sinks that the spec asks for.

        resume_step: the checkpoint's; None for a fresh start, which begins a new record. Raises OSError when a local
        record cannot be written. A service that does not answer is one warning.
        """
        writers: list[MetricsWriter] = [self.prometheus, _record(store, run_dir, attempt, resume_step)]
        logging_spec = self._job.spec.logging
        if logging_spec.tensorboard.enabled:
            uri = logging_spec.tensorboard.uri or join_uri(run_dir, "tensorboard")
            writers.append(Guarded("TensorBoard", tensorboard.TensorBoardWriter(uri, store, resume_step)))
        if logging_spec.wandb is not None:
            try:
                writers.append(Guarded("Weights & Biases", self._wandb(logging_spec.wandb, run_dir)))
            except DPOError:
                raise
            except Exception as error:  # noqa: BLE001 - the service is away: see Guarded
                log.warning("Weights & Biases is unavailable (%s); training continues without it", summary(error))
        if logging_spec.mlflow is not None:
            self._mlflow = mlflow.MlflowWriter(
                logging_spec.mlflow,
                job=self._job.metadata.name,
                run_dir=run_dir,
                params=shown_settings(self._job),
            )
            writers.append(Guarded("MLflow", self._mlflow))
        self._writers = Writers(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one event to every sink; names have a group, as ``train/loss``. Raises OSError for a local record."""
        self._writers.write(step, metrics)

    def flush(self) -> None:
        """Flush every sink. Called before a checkpoint, since a later attempt does not repeat the steps before it.

        Raises OSError or DPOError if the run's record cannot be written; the checkpoint must not be written then.
        """
        self._writers.flush()

    def close(self, outcome: Outcome = Outcome.Succeeded) -> None:
        """Flush and close every sink and stop the server. Never raises. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._mlflow is not None:
            self._mlflow.outcome = outcome
        self._writers.close()
        if self._server is not None:
            self._server.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _wandb(self, settings: wandb.WandbSettings, run_dir: str) -> wandb.WandbWriter:
        folder = local_path_of(run_dir)
        if folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True)
            folder = Path(self._scratch.name)
        return wandb.WandbWriter(
            settings,
            job=self._job.metadata.name,
            run_dir=run_dir,
            folder=folder,
            config=shown_settings(self._job),
        )


def shown_settings(job: DPOJob) -> dict[str, Any]:
    """Return the fields that the manifest sets, for an external service.

    The spec names Secrets but does not hold them. podTemplate is left out, since users may put secrets into its env.
    """
    return job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"pod_template"})


def _record(store: Store, run_dir: str, attempt: int, resume_step: int | None) -> MetricsWriter:
    local = local_path_of(run_dir)
    if local is not None:
        return LocalLog(local / "metrics.jsonl", resume_step)
    return ObjectLog(store, run_dir, attempt, resume_step)
