"""TensorBoard event files, in a local folder or copied to an object store as they grow."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from dpo_api.errors import InvalidSpecError
from dpo_store import Store, join_uri, local_path_of
from dpo_trainer.metrics.writer import Background

COPY_SECONDS = 60.0
"""Minimum time between two copies of the event files to an object store."""


def check() -> None:
    """Raise InvalidSpecError when TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise InvalidSpecError(
            "spec.logging.tensorboard.enabled: the tensorboard package is not installed here; install it or set false"
        ) from None


class TensorBoardWriter:
    """Writes scalars under the metrics' names, by optimizer step.

    A resumed run writes another event file, which makes TensorBoard drop the steps after the checkpoint.
    """

    def __init__(self, uri: str, store: Store, resume_step: int | None, interval: float = COPY_SECONDS) -> None:
        """Write into the folder ``uri``."""
        from torch.utils.tensorboard import SummaryWriter

        self._uri, self._store = uri, store
        local = local_path_of(uri)
        self._temporary = tempfile.TemporaryDirectory(prefix="tensorboard-") if local is None else None
        self._folder = Path(self._temporary.name) if self._temporary else Path(local or ".")
        # Purging drops an earlier attempt's points from this step on, as metrics.jsonl does.
        self._writer = SummaryWriter(str(self._folder), purge_step=0 if resume_step is None else resume_step + 1)
        self._copy = Background(uri, self._put, interval) if self._temporary else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See MetricsWriter."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if self._copy is not None:
            self._copy.request()

    def flush(self) -> None:
        """See MetricsWriter."""
        self._writer.flush()
        if self._copy is not None:
            self._copy.now()

    def close(self) -> None:
        """See MetricsWriter."""
        self._writer.close()
        if self._copy is not None:
            self._copy.finish()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _put(self) -> None:
        self._writer.flush()
        # Read each file at once: the writer's thread may append during a slow upload.
        for path in sorted(self._folder.iterdir()):
            self._store.write(join_uri(self._uri, path.name), path.read_bytes())
