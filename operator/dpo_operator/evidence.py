"""Collects why an attempt's pods ended, and records it in the status, because pods are deleted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_api.progress import LastWords
from dpo_api.status import Attempt, PodRecord, StatusProgress
from dpo_operator.backend import pytorchjob
from dpo_operator.classification import (
    Cause,
    cause_of_pod,
    cause_of_record,
    decisive,
    exit_code,
    last_words,
    record_of,
)
from dpo_operator.draft import Draft
from dpo_operator.progress import bounded, fitting_uri, summarise
from dpo_operator.reasons import Reason, named
from dpo_operator.starting import is_stuck
from dpo_operator.types import Object
from dpo_operator.view import moment

RECORDS_MAX = 64
SILENT_KEPT = 16
"""Of the pods that are recorded, how many may be ones that were not seen to end although others have no room."""


def over_at(draft: Draft) -> float | None:
    """Return when clean-up began: when the PyTorchJob failed or succeeded, or when the operator ended the attempt."""
    if named(draft.current.reason).ended_by_operator:
        return -math.inf  # earlier deletions are recorded already
    for condition in ((draft.child or {}).get("status") or {}).get("conditions") or ():
        if condition.get("type") in ("Failed", "Succeeded") and condition.get("status") == "True":
            return moment(condition.get("lastTransitionTime"))
    return None


def _shown(draft: Draft) -> Sequence[Cause | None]:
    """Return what each of the newest attempt's pods shows: once a pass, since a job may have a thousand pods."""
    stamp = over_at(draft)
    key = (draft.current.number, stamp)
    if draft.shown is None or draft.shown[0] != key:
        limit = draft.view.spec.resources.memory
        draft.shown = key, [cause_of_pod(pod, memory_limit=limit, over_at=stamp) for pod in draft.pods]
    return draft.shown[1]


def causes(draft: Draft) -> list[Cause]:
    """Return the causes that pods show now, and the recorded ones of pods that no longer show them."""
    found = _shown(draft)
    seen = {cause.pod for cause in found if cause is not None}
    recorded = [cause_of_record(record) for record in draft.current.pods if record.name not in seen]
    return [cause for cause in (*found, *recorded) if cause is not None]


def explain(draft: Draft) -> Cause:
    """Return the cause of a failed attempt; PodVanished if there is no evidence."""
    found = decisive(causes(draft))
    if found is not None:
        return found
    said = pytorchjob.failure_message(draft.child) if draft.child is not None else ""
    text = "no pod is left that shows how the attempt ended"
    return Cause(Reason.PodVanished, f"{text}: {said}" if said else text)


def record(draft: Draft) -> None:
    """Record how pods ended: one record per pod, those with a cause first, at most RECORDS_MAX."""
    known = {record.name: record for record in draft.current.pods}
    all_run = draft.current.running_time is not None
    fresh = {}
    for pod, cause in zip(draft.pods, _shown(draft), strict=True):
        name = str(pod["metadata"]["name"])
        former = known.get(name)
        # Running pods are recorded once all of them run: one status write for all.
        if former is None and cause is None and not all_run and exit_code(pod) is None:
            continue
        recorded = former.reason if former is not None else None
        # A pod that is being deleted no longer shows that it did not start in time.
        if recorded is not None and (cause is None or recorded == Reason.StartTimeout.value):
            continue
        fresh[name] = pod, cause
    _keep(draft, known, fresh)


def record_stuck(draft: Draft) -> None:
    """Record which pods, and so which nodes, did not start in time: later they only show the operator's deletion."""
    known = {record.name: record for record in draft.current.pods}
    late = Cause(Reason.StartTimeout, "")
    _keep(draft, known, {str(pod["metadata"]["name"]): (pod, late) for pod in draft.pods if is_stuck(pod)})


def _keep(draft: Draft, known: Mapping[str, PodRecord], fresh: Mapping[str, tuple[Object, Cause | None]]) -> None:
    """Keep records: the known ones and, in their place or after them, those of the fresh pods."""
    ends = {name: _End(record.reason, record.exit_code) for name, record in known.items()}
    for name, (pod, cause) in fresh.items():
        ends[name] = _End(cause.reason.value if cause is not None else None, exit_code(pod))
    kept = tuple(record_of(*fresh[name]) if name in fresh else known[name] for name in _chosen(ends))
    if kept != draft.current.pods:
        draft.change_attempt(pods=kept, pods_omitted=None)  # of the newest attempt ``size`` counts them again


class _End(NamedTuple):
    """How a pod ended, as far as it was seen."""

    reason: str | None
    exit_code: int | None

    @property
    def is_silent(self) -> bool:
        """Whether the pod was never seen to end."""
        return self.reason is None and self.exit_code is None

    @property
    def importance(self) -> tuple[bool, bool]:
        """Smallest first: pods with a cause, then those with an exit code other than 0."""
        return self.reason is None, self.exit_code in (None, 0)


def _chosen(ends: Mapping[str, _End]) -> list[str]:
    """Return the names of the pods whose records are kept, in the order of their records."""
    ordered = sorted(ends, key=lambda name: ends[name].importance)
    if len(ordered) <= RECORDS_MAX:
        return ordered
    # Many pods may report the same loss of contact. The few that do not are what the next attempt has to know, and so
    # is the one that explains it.
    silent = [name for name in ordered if ends[name].is_silent][:SILENT_KEPT]
    apart = set(silent)
    others = [name for name in ordered if name not in apart]
    others.sort(key=lambda name: (*ends[name].importance, named(ends[name].reason).rank))
    chosen = {*others[: RECORDS_MAX - len(silent)], *silent}
    return [name for name in ordered if name in chosen]


def words_of(pods: Sequence[Object]) -> list[LastWords]:
    """Return the termination messages of pods, rank 0's first."""
    return [words for words in map(last_words, pods) if words is not None]


def steps(draft: Draft) -> None:
    """Take steps and the newest checkpoint from termination messages."""
    words = words_of(draft.pods)
    if not words:
        return
    last = max(w.step for w in words)
    if last > (draft.current.last_step or 0):
        draft.change_attempt(last_step=last)
    saved = max(w.last_checkpoint_step or 0 for w in words)
    progress = draft.status.progress or StatusProgress(phase="checkpoint", observed_at=draft.moment)
    if saved > (progress.last_checkpoint_step or 0):
        changes = {"last_checkpoint_step": saved, "step": max(saved, progress.step)}
        draft.update(progress=progress.model_copy(update=changes))


def last_values(draft: Draft) -> None:
    """Take rank 0's metrics from its termination message: they are newer than its last response, if there was one."""
    words = next((last_words(pod) for pod in draft.pods if pytorchjob.is_rank_zero(pod)), None)
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


def exported(draft: Draft) -> None:
    """Take the model of an attempt that failed after its export, when it could not push it, from rank 0's message."""
    words = next((last_words(pod) for pod in draft.pods if pytorchjob.is_rank_zero(pod)), None)
    if words is not None and (uri := fitting_uri(words.model_uri)) is not None:
        draft.update(model_uri=uri, model_step=words.model_step)


def broken_nodes(attempts: Sequence[Attempt], last: int = 3) -> list[str]:
    """Return the nodes to avoid: those that the newest failures speak against, the most recent first."""
    nodes: list[str] = []
    for attempt in attempts[-last:]:
        if attempt.result != "Failed":
            continue
        explained = [r.node for r in attempt.pods if r.node is not None and r.reason == attempt.reason]
        match named(attempt.reason).suspects:
            case "its node":
                nodes += explained
            case "silent nodes" if explained:
                silent = [r.node for r in attempt.pods if r.node is not None and _End(r.reason, r.exit_code).is_silent]
                nodes += [node for node in silent if node not in explained]
            case _:
                pass
    return list(dict.fromkeys(reversed(nodes)))
