"""How much of a conversion is written: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from torch import Tensor

from dpo_api.texts import sizes

_SECONDS = 10.0


class Progress:
    """Counts bytes of weights."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._done = total, what, 0
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Bar(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(what, total=total)
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def counted(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is about to be written, and return it."""
        self.skip(tensor.numel() * tensor.itemsize)
        return tensor

    def skip(self, count: int) -> None:
        """Count bytes that are written already."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            done, total = sizes(self._done, self._total)
            print(f"{self._what}: {done} of {total}", file=sys.stderr, flush=True)
