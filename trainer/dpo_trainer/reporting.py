"""Reports a run's progress and metrics: every phase reports to one object.

On ranks other than 0 it only notes where the rank is, for the others if they wait for it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_api.errors import Outcome
from dpo_api.manifest import DPOJob
from dpo_api.metrics import MEMORY_PEAK, MEMORY_PREDICTED, SLOWEST_RANK, SLOWEST_RATIO
from dpo_api.plan import Plan
from dpo_api.progress import Best, Phase
from dpo_api.texts import size
from dpo_trainer.data.problems import Reason
from dpo_trainer.distributed import World
from dpo_trainer.metrics.hub import Hub
from dpo_trainer.metrics.prometheus import PrometheusMetrics
from dpo_trainer.metrics.writer import without_meaningless
from dpo_trainer.pace import Slow, Slowness
from dpo_trainer.rundir import RunDirectory

_TIMED: frozenset[Phase] = frozenset({"reference", "validate"})
"""Phases in which all ranks do equal parts of the work, until the last unit is done."""


class Reporter:
    """The reports of one attempt. ``latest`` holds the newest metrics, the same on every rank.

    ``predicted_memory``: bytes that rank 0's GPU was predicted to take; None on CPU. ``hosts``: of all ranks; empty in
    a run of one.
    """

    def __init__(
        self, job: DPOJob, world: World, *, events: Path | None = None, port: int | None = None, host: str = ""
    ) -> None:
        """Open the hub on rank 0; raises what Hub raises there."""
        self.latest: dict[str, float] = {}
        self.last_checkpoint: int | None = None
        self._place = world.place
        self.predicted_memory: int | None = None
        self.hosts: list[str] = []
        self._slowness = Slowness()
        self._monitor = job.spec.checkpoint.monitor
        self._hub = Hub(job, port=port, host=host, events=events) if world.is_main else None

    def begin(self, directory: RunDirectory, layout: str = "") -> None:
        """Report the attempt's number, once the run directory is claimed, and the run's layout."""
        self._directory = directory
        if self._hub is not None:
            self._hub.begin(directory.attempt, layout)

    @property
    def finite_latest(self) -> dict[str, float]:
        """``latest`` without NaN and infinities, which JSON does not have."""
        return {name: value for name, value in self.latest.items() if math.isfinite(value)}

    def phase(self, phase: Phase, *, done: int | None = None, of: int | None = None, message: str = "") -> None:
        """Enter a phase, or a part of it."""
        self._place.enter(phase, timed=phase in _TIMED and done != of)
        if self._hub is not None:
            self._hub.progress.phase(phase, done=done, of=of, message=message)

    def note(self, text: str) -> None:
        """Print one sentence to the log."""
        if self._hub is not None:
            print(text, flush=True)

    def warn(self, *texts: str) -> None:
        """Print warnings to the log, and report them to those who follow the run."""
        for text in texts:
            self.note(f"warning: {text}")
        if self._hub is not None:
            self._hub.progress.warn(texts)

    def verified(self, verified: bool | None, verdict: str) -> None:
        """Report what the comparison of the layout with one process found."""
        self.note(f"layout {verdict}")
        if self._hub is not None:
            self._hub.progress.verified(verified, verdict)

    def loaded(self, read: int, seconds: float) -> None:
        """Report that the model's weights are loaded. read: bytes that all ranks read."""
        rate = f" ({size(read / seconds)}/s)" if seconds > 0 else ""
        self.note(f"read {read:,} bytes of weights in {seconds:.1f} s{rate}")

    def indexed(self, plan: Plan, stats: dict[str, Any], warnings: Sequence[str] = ()) -> None:
        """Report the run's length and the pairs that were dropped.

        stats: of the training data. warnings: in addition to the plan's.
        """
        if self._hub is None:
            return
        self.warn(*(str(finding) for finding in plan.warnings), *warnings)
        figures = self._hub.prometheus
        figures.set("dpo_train_planned_steps", plan.total_steps)
        figures.set("dpo_data_pairs", plan.train_pairs)
        for reason in Reason:  # zeros too: 0 and "not counted" must differ
            figures.set("dpo_data_dropped_pairs", stats["dropped"].get(reason.value, 0), reason=reason.value)
        self._hub.progress.plan(step=0, total=plan.total_steps)
        dropped = sum(stats["dropped"].values())
        found = f"{plan.train_pairs:,} pairs, {dropped:,} dropped, {stats['tokens']:,} tokens"
        self._hub.progress.phase("index", message=f"{found}, longest {stats['longest']:,}")

    def start_training(self, step: int, plan: Plan, *, resumed: bool, saved_at: float | None = None) -> None:
        """Continue the metrics record at the checkpoint of ``step``, or start a new one.

        saved_at: Unix time of the checkpoint.
        """
        self.last_checkpoint = step if resumed else None
        if self._hub is not None:
            directory = self._directory
            resume_step = step if resumed else None
            self._hub.open_sinks(directory.store, directory.uri, attempt=directory.attempt, resume_step=resume_step)
            if resumed:
                _saved(self._hub.prometheus, step, saved_at)
            self._hub.progress.plan(
                step=step,
                total=plan.total_steps,
                epoch=step / plan.steps_per_epoch,
                last_checkpoint_step=self.last_checkpoint,
            )
            if resumed:
                self._hub.progress.phase("starting", message=f"resumed from step {step}")

    def stepping(self, step: int) -> None:
        """Report that a step begins, so that the phase is not the checkpoint or validation before it.

        step: its number, from 1.
        """
        self._place.enter("train", step=step, timed=True)
        if self._hub is not None and self._hub.progress.newest.phase != "train":
            self._hub.progress.phase("train")

    def stepped(
        self,
        step: int,
        values: dict[str, float],
        *,
        seconds: float,
        tokens: int,
        pairs: int,
        waited: float,
        at_start: float | None = None,
    ) -> None:
        """Report one optimizer step.

        tokens, pairs: of all processes. waited: seconds of the step spent on data. at_start: the preference loss of
        these pairs while the policy equals its reference, if known.
        """
        named = {f"train/{name}": value for name, value in values.items()}
        self.latest |= named
        if self._hub is not None:
            named = named | memory_metrics(peak_memory(), self.predicted_memory)  # this rank's: not in ``latest``
            self._hub.write(step, named)
            self._hub.prometheus.add("dpo_train_tokens_total", tokens)
            self._hub.prometheus.add("dpo_data_wait_seconds_total", waited)
            self._hub.progress.step(
                step,
                epoch=values["epoch"],
                seconds=seconds,
                tokens=tokens,
                pairs=pairs,
                metrics=named,
                at_start=at_start,
            )
            self._paced(named)  # after the step that it is of, and not with the one before

    def _paced(self, named: dict[str, float]) -> None:
        """Report a rank that stays slow, and print a warning when it becomes so."""
        assert self._hub is not None  # noqa: S101 - rank 0 alone calls this
        if SLOWEST_RANK not in named:
            return
        former = self._slowness.now
        self._slowness.add(Slow(int(named[SLOWEST_RANK]), named[SLOWEST_RATIO]))
        now = self._slowness.now
        if now == former:
            return
        host = self.hosts[now.rank] if now is not None and self.hosts else ""
        self._hub.progress.slow(now, host)
        if now is not None:
            self.warn(
                f"rank {now.rank}{f' on {host}' if host else ''} takes {now.ratio:.1f} times as long as the"
                " median for its own part of a step"
            )

    def validated(self, step: int, values: dict[str, float], *, at_start: float | None = None) -> None:
        """Report one validation, after ``step`` optimizer steps. ``at_start``: see ``stepped``."""
        named = {f"val/{name}": value for name, value in values.items()}
        meaningful = without_meaningless(step, named)
        self.latest |= meaningful
        if self._hub is not None:
            self._hub.write(step, named)
            self._hub.progress.measured(meaningful, at_start=at_start)

    def best(self, best: Best | None) -> None:
        """Report the best validation so far; None: there is none."""
        if self._hub is None:
            return
        self._hub.progress.best(best)
        if self._monitor is not None:
            value, step = (math.nan, math.nan) if best is None else (best.value, best.step)
            self._hub.prometheus.set("dpo_checkpoint_best_value", value, metric=self._monitor)
            self._hub.prometheus.set("dpo_checkpoint_best_step", step)

    def flush(self) -> None:
        """Write the metrics record out, so that it is at least as new as the checkpoint that follows."""
        if self._hub is not None:
            self._hub.flush()

    def checkpointed(self, step: int, at: float) -> None:
        """Report a complete checkpoint. at: Unix time."""
        self.last_checkpoint = step
        if self._hub is not None:
            _saved(self._hub.prometheus, step, at)
            self._hub.progress.saved(step)

    def waited_for_checkpoint(self, seconds: float) -> None:
        """Report time in which training waited for a checkpoint."""
        if self._hub is not None:
            self._hub.prometheus.add("dpo_checkpoint_wait_seconds_total", seconds)

    def finished_before(self, step: int, metrics: dict[str, float]) -> None:
        """Report that an earlier attempt has finished the run."""
        self.latest = dict(metrics)
        if self._hub is not None:
            self._hub.progress.finished(step, metrics)

    def close(self, outcome: Outcome = Outcome.Succeeded) -> None:
        """Flush and close every metrics writer and stop the server. outcome: how the run ended."""
        if self._hub is not None:
            self._hub.close(outcome)


def peak_memory() -> int | None:
    """Most bytes that tensors have taken of this process's GPU; None on CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def memory_metrics(peak: int | None, predicted: int | None) -> dict[str, float]:
    """Return a GPU's memory by the keys of metrics.jsonl; what is unknown has no key."""
    found = {MEMORY_PEAK: peak, MEMORY_PREDICTED: predicted}
    return {key: float(value) for key, value in found.items() if value is not None}


def _saved(figures: PrometheusMetrics, step: int, at: float | None) -> None:
    figures.set("dpo_checkpoint_last_step", step)
    if at is not None:
        figures.set("dpo_checkpoint_last_success_timestamp_seconds", at)
