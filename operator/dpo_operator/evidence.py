"""What an attempt's pods say, and what of it is kept: pods vanish, and their causes must not vanish with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dpo_api.progress import LastWords
from dpo_api.status import Attempt, PodRecord, StatusProgress
from dpo_operator.backend import pytorchjob
from dpo_operator.classification import Cause, cause_of_pod, cause_of_record, decisive, last_words, record_of
from dpo_operator.draft import Draft
from dpo_operator.progress import bounded, summarise
from dpo_operator.reasons import Reason
from dpo_operator.starting import is_stuck
from dpo_operator.types import Object
from dpo_operator.view import moment

RECORDS_MAX = 64

OURS = frozenset(
    reason.value for reason in (Reason.Suspended, Reason.StartTimeout, Reason.Stalled, Reason.DeadlineExceeded)
)
"""Reasons for which the operator itself ends an attempt, by deleting its child."""

_NODE_IS_INNOCENT = frozenset(
    reason.value for reason in (Reason.Stopped, Reason.Preempted, Reason.PodDeleted, Reason.StorageUnavailable)
)


def over_at(attempt: Attempt, child: Object | None) -> float | None:
    """Return when the clean-up began: training-operator's, which calls the child failed or succeeded, or our own."""
    if attempt.reason in OURS:
        return -math.inf  # what somebody deleted before we did is on record
    for condition in ((child or {}).get("status") or {}).get("conditions") or ():
        if condition.get("type") in ("Failed", "Succeeded") and condition.get("status") == "True":
            return moment(condition.get("lastTransitionTime"))
    return None


def causes(draft: Draft, attempt: Attempt, child: Object | None) -> list[Cause]:
    """Return the causes that pods show now, and those recorded of pods that no longer show them."""
    pods = draft.view.pods(attempt)
    limit = draft.view.spec.resources.memory
    stamp = over_at(attempt, child)
    found = [cause_of_pod(pod, memory_limit=limit, over_at=stamp) for pod in pods]
    seen = {cause.pod for cause in found if cause is not None}
    recorded = [cause_of_record(record) for record in attempt.pods if record.name not in seen]
    return [cause for cause in (*found, *recorded) if cause is not None]


def explain(draft: Draft, attempt: Attempt, child: Object | None) -> Cause:
    """Return the cause of an attempt that has failed, PodVanished where nothing says more."""
    found = decisive(causes(draft, attempt, child))
    if found is not None:
        return found
    said = pytorchjob.failure_message(child) if child is not None else ""
    text = "no pod is left to say how the attempt ended"
    return Cause(Reason.PodVanished, f"{text}: {said}" if said else text)


def record(draft: Draft, attempt: Attempt, child: Object | None) -> None:
    """Keep what ended pods show: one record a pod, those with a cause first, at most RECORDS_MAX."""
    limit = draft.view.spec.resources.memory
    stamp = over_at(attempt, child)
    records = {record.name: record for record in attempt.pods}
    all_run = attempt.running_time is not None
    for pod in draft.view.pods(attempt):
        cause = cause_of_pod(pod, memory_limit=limit, over_at=stamp)
        fresh = record_of(pod, cause)
        known = records.get(fresh.name)
        # Pods that merely run are written down once all of them do: one write for all.
        if known is None and cause is None and not all_run and fresh.exit_code is None:
            continue
        told = known.reason if known is not None else None
        # Once it is deleted a pod no longer shows that it had not run in time.
        if told is not None and (cause is None or told == Reason.StartTimeout.value):
            continue
        records[fresh.name] = fresh
    _keep(draft, attempt, records.values())


def record_stuck(draft: Draft, attempt: Attempt) -> None:
    """Keep which pods did not run in time, and so which nodes: the operator's own deletion is all they show later."""
    records = {record.name: record for record in attempt.pods}
    for pod in draft.view.pods(attempt):
        if is_stuck(pod):
            fresh = record_of(pod, Cause(Reason.StartTimeout, ""))
            records[fresh.name] = fresh
    _keep(draft, attempt, records.values())


def _keep(draft: Draft, attempt: Attempt, records: Iterable[PodRecord]) -> None:
    ordered = sorted(records, key=lambda r: (r.reason is None, r.exit_code in (None, 0)))
    kept = tuple(ordered[:RECORDS_MAX])
    if kept != attempt.pods:
        draft.change_attempt(pods=kept)


def words_of(pods: Sequence[Object]) -> list[LastWords]:
    """Return all last words that pods left, rank 0's first."""
    return [words for words in map(last_words, pods) if words is not None]


def steps(draft: Draft, attempt: Attempt) -> None:
    """Take steps and the newest checkpoint from last words: a run that was asked to stop may have saved nothing."""
    words = words_of(draft.view.pods(attempt))
    if not words:
        return
    last = max(w.step for w in words)
    if last > (attempt.last_step or 0):
        draft.change_attempt(last_step=last)
    saved = max(w.last_checkpoint_step or 0 for w in words)
    progress = draft.status.progress or StatusProgress(phase="checkpoint", observed_at=draft.moment)
    if saved > (progress.last_checkpoint_step or 0):
        changes = {"last_checkpoint_step": saved, "step": max(saved, progress.step)}
        draft.update(progress=progress.model_copy(update=changes))


def last_values(draft: Draft, attempt: Attempt) -> None:
    """Take rank 0's metrics from its last words: they are younger than its last answer, and it may have given none."""
    words = next((last_words(pod) for pod in draft.view.pods(attempt) if pytorchjob.is_rank_zero(pod)), None)
    if words is None or not words.metrics:
        return
    progress = draft.status.progress or StatusProgress(phase="checkpoint", observed_at=draft.moment)
    changes = {
        "step": max(progress.step, words.step),
        "total": words.total or progress.total,
        "metrics": bounded({**progress.metrics, **words.metrics}),
    }
    progress = progress.model_copy(update=changes)
    draft.update(progress=progress, summary=summarise(progress).model_copy(update={"eta": None}))


def broken_nodes(attempts: Sequence[Attempt], last: int = 3) -> list[str]:
    """Return the nodes to avoid: those whose pods explain the newest failures, and all that were lost or drained."""
    nodes: list[str] = []
    for attempt in attempts[-last:]:
        if attempt.result != "Failed":
            continue
        nodes += [r.node for r in attempt.pods if r.node is not None and r.reason is not None and _blames(r, attempt)]
    return list(dict.fromkeys(reversed(nodes)))


def _blames(record: PodRecord, attempt: Attempt) -> bool:
    """Whether a pod's end speaks against its node."""
    return record.reason == attempt.reason and attempt.reason not in _NODE_IS_INNOCENT
