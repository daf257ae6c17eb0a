"""All that rank 0 tells the world, opened from one spec: the run's record, Prometheus, TensorBoard, W&B, progress."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_api.errors import DPOError
from dpo_api.manifest import DPOJob
from dpo_api.version import VERSION
from dpo_store import Store, join_uri, local_path_of
from dpo_trainer.metrics import tensorboard, wandb
from dpo_trainer.metrics.jsonl import LocalLog, ObjectLog
from dpo_trainer.metrics.progress import ProgressTracker
from dpo_trainer.metrics.prometheus import PrometheusMetrics
from dpo_trainer.metrics.server import StatusServer
from dpo_trainer.metrics.writer import Guarded, MetricsWriter, Writers, summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """Where a run's figures go."""

    store: Store
    run_dir: str  #: URI of the run directory
    attempt: int
    scratch: Path  #: local folder for files that the run directory, being remote, cannot hold
    port: int | None = None  #: of /metrics, /status and /healthz; None: no server; 0: a free port
    host: str = ""  #: address that the port listens on; empty: all
    events: Path | None = None  #: file that `dpo run` follows


class Hub:
    """Rank 0's outlet: ``progress`` and ``prometheus`` from the start, the sinks of metrics from ``open_sinks`` on.

    Two stages, because /status must answer while the model loads, and the record can only be continued once the
    checkpoint's step is known.
    """

    def __init__(self, job: DPOJob, to: Destination) -> None:
        """Start the server and check what the spec's sinks need.

        Raises PortInUseError; InvalidSpecError and AccessDeniedError for a sink that cannot work here as it is set.
        """
        self._job, self._to = job, to
        logging_spec = job.spec.logging
        if logging_spec.tensorboard.enabled:
            tensorboard.check()
        if logging_spec.wandb is not None:
            wandb.check(logging_spec.wandb)
        self.prometheus = PrometheusMetrics()
        self.prometheus.set("dpo_trainer_info", 1, version=VERSION, job=job.metadata.name, attempt=str(to.attempt))
        self._server = None if to.port is None else StatusServer(self.prometheus.registry, to.port, to.host)
        self.progress = ProgressTracker(to.events, self._server, attempt=to.attempt)
        self._writers = Writers([self.prometheus])
        self._closed = False

    @property
    def port(self) -> int | None:
        """The port that is served."""
        return None if self._server is None else self._server.port

    def open_sinks(self, resume_step: int | None) -> None:
        """Open the run's record and the sinks that the spec asks for.

        resume_step: the checkpoint's; None for a fresh start, which begins a new record. Raises OSError when a local
        record cannot be written. A service that does not answer is one warning.
        """
        to, logging_spec = self._to, self._job.spec.logging
        writers: list[MetricsWriter] = [self.prometheus, _record(to, resume_step)]
        if logging_spec.tensorboard.enabled:
            uri = logging_spec.tensorboard.uri or join_uri(to.run_dir, "tensorboard")
            writers.append(Guarded("TensorBoard", tensorboard.TensorBoardWriter(uri, to.store, resume_step)))
        if logging_spec.wandb is not None:
            try:
                writers.append(Guarded("Weights & Biases", self._wandb(logging_spec.wandb)))
            except DPOError:
                raise
            except Exception as error:  # noqa: BLE001 - the service is away: see Guarded
                log.warning("Weights & Biases does not answer (%s); training goes on without it", summary(error))
        self._writers = Writers(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event to every sink: metrics with their group, ``train/loss``. Raises OSError for a local record only."""
        self._writers.write(step, metrics)

    def flush(self) -> None:
        """Bring every sink up to date: before a checkpoint, whose steps a later attempt will not repeat."""
        self._writers.flush()

    def close(self) -> None:
        """Write what is left and stop the server. Never raises: it also runs after a failure. Twice does no harm."""
        if self._closed:
            return
        self._closed = True
        self._writers.close()
        if self._server is not None:
            self._server.close()

    def _wandb(self, settings: wandb.WandbSettings) -> wandb.WandbWriter:
        return wandb.WandbWriter(
            settings,
            job=self._job.metadata.name,
            run_dir=self._to.run_dir,
            folder=local_path_of(self._to.run_dir) or self._to.scratch,
            # Of the spec what the manifest says. It names secrets; it never holds one.
            config=self._job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True),
        )


def _record(to: Destination, resume_step: int | None) -> MetricsWriter:
    local = local_path_of(to.run_dir)
    if local is not None:
        return LocalLog(local / "metrics.jsonl", resume_step)
    remote = ObjectLog(to.store, to.run_dir, to.attempt)
    return Guarded(remote.uri, remote)
