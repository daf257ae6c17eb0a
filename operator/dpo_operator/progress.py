"""status.progress and the columns of `kubectl get`, from what rank 0 answered. The answer is not trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dpo_api.metrics import ACCURACY, MARGIN, newest_group
from dpo_api.progress import PHASE_TEXTS, PHASE_UNITS, Best, Progress
from dpo_api.status import REVISIONS_MAX, BestValidation, ConditionType, StatusProgress, Summary
from dpo_api.texts import age, fixed
from dpo_operator import clock, names
from dpo_operator.conditions import find
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason
from dpo_operator.texts import clean

METRICS_MAX = 128
INT_MAX = 2**53
PATIENCE_SECONDS = 300.0
"""How long rank 0 may be silent, after all pods are running, before a condition reports it."""


def bounded(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return at most as many metrics as the status can hold, without names that are too long."""
    kept = [(name, value) for name, value in metrics.items() if 0 < len(name) <= 128 and name.isprintable()]
    return {name: float(value) for name, value in sorted(kept)[:METRICS_MAX] if math.isfinite(value)}


def fitting_uri(uri: str | None) -> str | None:
    """Return the URI if it fits into the status; it is never truncated."""
    return uri if uri and len(uri) <= 1024 and uri.isprintable() else None


def _count(value: float | None) -> int | None:
    return None if value is None else int(min(value, INT_MAX))


def status_of(said: Progress, at: float, former: StatusProgress | None) -> StatusProgress:
    """Return an answer that was given at ``at`` in the form of the status."""
    changed = clock.to_text(at)
    if former is not None and former.changed_at is not None and _same_place(said, former):
        changed = former.changed_at
    return StatusProgress(
        phase=said.phase,
        step=min(said.step, INT_MAX),
        total=min(said.total, INT_MAX),
        epoch=round(min(said.epoch, 1e9), 4),
        eta_seconds=_count(said.eta_seconds),
        tokens_per_second=None if said.tokens_per_second is None else round(min(said.tokens_per_second, 1e15), 1),
        done=_count(said.done),
        of=_count(said.of),
        message=clean(said.message) or None,
        metrics=bounded(said.metrics),
        last_checkpoint_step=_count(said.last_checkpoint_step),
        best=best_of(said.best) or (former.best if former is not None else None),
        layout=clean(said.layout, 64) or None,
        revisions=tuple(clean(each, 256) for each in said.revisions[:REVISIONS_MAX]) or None,
        observed_at=clock.to_text(at),
        changed_at=changed,
    )


def best_of(said: Best | None) -> BestValidation | None:
    """Return the best validation in the form of the status; None if its value is not finite."""
    if said is None or not math.isfinite(said.value):
        return None
    return BestValidation(metric=clean(said.metric, 128), step=min(said.step, INT_MAX), value=said.value)


def _same_place(said: Progress, former: StatusProgress) -> bool:
    return (said.phase, said.step, said.done) == (former.phase, former.step, former.done)


def said_now(draft: Draft) -> Progress | None:
    """Return rank 0's newest answer, if it is one of the current attempt."""
    attempt, scrape = draft.attempt, draft.view.observed.scrape
    if attempt is None or scrape is None or scrape.child != attempt.child or scrape.progress is None:
        return None
    # The whole number, which has the DPOJob's creation time: a pod's address may be another job's by now.
    fence = names.fence(draft.view.identity.created, attempt.number)
    return scrape.progress if scrape.progress.attempt == fence else None


def apply(draft: Draft) -> None:
    """Copy the newest answer of the current attempt's rank 0 to the status, or report that there is none."""
    attempt, scrape = draft.attempt, draft.view.observed.scrape
    if attempt is None or attempt.result is not None or scrape is None or scrape.child != attempt.child:
        return
    said = said_now(draft)
    if said is None:
        _silence(draft, scrape.error or "the answer belongs to another attempt or job")
        return
    former = draft.status.progress
    current = status_of(said, scrape.at, former)
    checkpoint = max(current.last_checkpoint_step or 0, (former and former.last_checkpoint_step) or 0)
    if current.last_checkpoint_step is None and checkpoint:
        current = current.model_copy(update={"last_checkpoint_step": checkpoint})
    draft.update(progress=current, summary=summarise(current))
    if attempt.last_step is None or current.step > attempt.last_step:
        draft.change_attempt(last_step=current.step)
    if said.from_step is not None:  # so far it was the last checkpoint that the previous attempt reported
        draft.change_attempt(from_step=min(said.from_step, INT_MAX))
    draft.condition(ConditionType.ProgressAvailable, "True", Reason.ScrapeSucceeded, "Rank 0 answers GET /status.")


def _silence(draft: Draft, error: str) -> None:
    """Report silence as a condition, never as a stall: perhaps only the network to the pod is at fault."""
    attempt = draft.attempt
    running = None if attempt is None or attempt.running_time is None else clock.to_moment(attempt.running_time)
    known = find(draft.status.conditions, ConditionType.ProgressAvailable)
    if running is None or (known is None and draft.now < running + PATIENCE_SECONDS):
        return
    if known is not None and known.status == "False":
        return  # the error may differ at each try; that is not worth a write
    text = f"Rank 0 does not answer GET /status: {clean(error, 300)}."
    draft.condition(ConditionType.ProgressAvailable, "False", Reason.ScrapeFailed, text)


def summarise(progress: StatusProgress) -> Summary:
    """Return the columns: accuracy and margin of the validation once there is one, otherwise of training."""
    metrics = progress.metrics
    group = newest_group(metrics)
    left = progress.eta_seconds
    return Summary(
        step=f"{progress.step}/{progress.total}"[:32] if progress.total else None,
        accuracy=_fixed(metrics.get(f"{group}/{ACCURACY}"), 2),
        margin=_fixed(metrics.get(f"{group}/{MARGIN}"), 2),
        loss=_fixed(metrics.get("train/loss"), 4),
        eta=age(left)[:32] if left and progress.phase != "done" else None,
        layout=progress.layout,
    )


def _fixed(value: float | None, decimals: int) -> str | None:
    return None if value is None else fixed(value, decimals)


def sentence(progress: StatusProgress | None) -> str:
    """Describe the phase and step of a running attempt."""
    if progress is None:
        return "All pods are running."
    where, unit = PHASE_TEXTS[progress.phase].capitalize(), PHASE_UNITS.get(progress.phase)
    if unit is not None and progress.done is not None:
        where += f": {progress.done:,} {unit}" + (f" of {progress.of:,}" if progress.of else "")
    elif progress.total and progress.step:
        where += f", step {progress.step} of {progress.total}"
    return f"{where}."
