"""How long each rank works on its own part of a step, its waits for others left out, and which rank is slower."""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_api.models import ModelConfig
from dpo_api.sizing import Work, seen_keys
from dpo_trainer.model.pack import Pack

SLOW_RATIO = 1.5
"""From how many times the median on a rank counts as slow. Steps of unlike pairs alone differ by a few percent."""

SLOW_STEPS = 5
"""How many steps in a row a rank must be slow before it is reported, and not be slow before that is withdrawn."""

_OWN = frozenset({"forward-compute", "backward-compute"})
"""Megatron-Core's names of what a stage computes itself; its other timers are about messages."""

Mark = float | torch.cuda.Event


class OwnTime:
    """Times a rank's forward and backward passes of one step. It never waits for the GPU.

    Megatron-Core's schedule calls it as its ``config.timers``, around each pass of a pack and not while a stage waits
    for another one. Tensor- and context-parallel ranks wait for each other within the passes: they look alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._spans: list[tuple[Mark, Mark, int]] = []
        self._prepared = 0.0
        self._timing = False
        self._since: Mark | None = None

    def begin(self, prepared: float) -> None:
        """Begin a step, whose packs took this rank ``prepared`` seconds to make."""
        self._spans, self._prepared, self._timing = [], prepared, True

    def end(self) -> None:
        """Passes from here on are not of the step."""
        self._timing = False

    @property
    def seconds(self) -> float:
        """Seconds of the last step. On a GPU the host must have read a result of that step."""
        return self._prepared + sum(sign * self._between(begin, end) for begin, end, sign in self._spans)

    def without(self, wait: Callable[..., None]) -> Callable[..., None]:
        """Return ``wait``, a function that waits for other ranks, with its time left out of a pass that calls it."""

        def waited(*arguments: object, **options: object) -> None:
            begin = None if self._since is None else self._mark()
            wait(*arguments, **options)
            if begin is not None:
                self._spans.append((begin, self._mark(), -1))

        return waited

    def __call__(self, name: str, **_options: int) -> "_Timer":
        """Return Megatron-Core's timer of this name."""
        return _Timer(self, counts=self._timing and name in _OWN)

    def start(self) -> None:
        """A pass begins."""
        self._since = self._mark()

    def stop(self) -> None:
        """It has ended."""
        if self._since is not None:
            self._spans.append((self._since, self._mark(), 1))
        self._since = None

    def _mark(self) -> Mark:
        if not self._gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(begin: Mark, end: Mark) -> float:
        if isinstance(begin, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)  # noqa: S101 - marks of one step are of one kind
            return float(begin.elapsed_time(end)) / 1000
        assert isinstance(end, float)  # noqa: S101
        return end - begin


@dataclass(frozen=True)
class _Timer:
    """What Megatron-Core starts and stops."""

    own: OwnTime
    counts: bool

    def start(self, **_options: bool) -> None:
        if self.counts:
            self.own.start()

    def stop(self) -> None:
        if self.counts:
            self.own.stop()


def work_of(packs: Sequence[Pack], config: ModelConfig) -> Work:
    """Return what this rank computes of the packs, padding left out."""
    windows = Counter(config.window_of(layer) for layer in range(config.num_layers))
    tokens = rows = seen = 0.0
    for pack in packs:
        share = 1 / pack.context_size  # its segments are those of the whole pack, its rows those of this rank
        tokens += share * pack.used
        rows += len(pack.rows)
        for segment in pack.segments:
            before = 0 if segment.parent is None else pack.segments[segment.parent].length
            keys = sum(layers * seen_keys(segment.length, before, window) for window, layers in windows.items())
            seen += share * keys
    return Work(tokens, rows, seen)


@dataclass(frozen=True)
class Slow:
    """A rank, and its time for an amount of work divided by the median of the ranks of its pipeline stage."""

    rank: int
    ratio: float


def slowest(ranks: Tensor) -> Slow | None:
    """Return the slowest rank, from [ranks, 3]: seconds, FLOPs and pipeline stage; None if none can be compared.

    Ranks of a stage with less than a quarter of its largest work are left out: what they do is mostly overhead. Of an
    even number of ranks the median is the lower one in the middle: of two, the other rank's.
    """
    found: list[Slow] = []
    for stage in ranks[:, 2].unique():
        rows = ((ranks[:, 2] == stage) & (ranks[:, 1] > 0)).nonzero().flatten()
        if len(rows) > 0:
            work = ranks[rows, 1]
            rows = rows[work >= work.max() / 4]
        each = ranks[rows, 0] / ranks[rows, 1]
        if len(rows) > 1 and float(each.median()) > 0:
            at = int(each.argmax())
            found.append(Slow(int(rows[at]), float(each[at] / each.median())))
    return max(found, key=lambda slow: slow.ratio, default=None)


class Slowness:
    """Whether one rank is much slower than the others for several steps in a row."""

    def __init__(self) -> None:
        self.now: Slow | None = None
        """That rank, with its median ratio at that time."""
        self._recent: deque[Slow | None] = deque(maxlen=SLOW_STEPS)

    def add(self, slow: Slow | None) -> None:
        """Add the slowest rank of one step."""
        self._recent.append(slow)
        marked = [each for each in self._recent if each is not None and each.ratio >= SLOW_RATIO]
        if len(marked) == SLOW_STEPS and len({each.rank for each in marked}) == 1:
            if self.now is None or self.now.rank != marked[0].rank:
                self.now = Slow(marked[0].rank, statistics.median(each.ratio for each in marked))
        elif self.now is not None and self.now.rank not in {each.rank for each in marked}:
            self.now = None
