"""Kubernetes events: one for each transition. A repeated pass gives the same name, so it creates no second event."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from dpo_api.manifest import API_VERSION, KIND
from dpo_api.status import Attempt, Condition, ConditionType, DPOJobStatus
from dpo_operator import clock, imageids, names
from dpo_operator.conditions import find, holds
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason, named
from dpo_operator.types import DeleteJob, EmitEvent

MESSAGE_MAX = 1000
CHECKPOINTS_PER_EVENT = 10


class Transition(NamedTuple):
    """One change between two statuses that an event reports."""

    reason: Reason
    message: str
    detail: str = ""
    """What distinguishes it from other transitions of the same job and reason; part of the event's name."""


INVARIANTS: tuple[tuple[ConditionType, Literal["True", "False"]], ...] = (
    (ConditionType.LayoutVerified, "False"),
    (ConditionType.ReferenceConsistent, "False"),
    (ConditionType.Finite, "False"),
    (ConditionType.Learning, "False"),
    (ConditionType.TrainingStalled, "True"),
    (ConditionType.SlowRank, "True"),
    (ConditionType.ProgressAvailable, "False"),
    (ConditionType.NetworkRestricted, "False"),
)
"""Conditions of the run, with the status that causes a warning."""


def transitions(old: DPOJobStatus, new: DPOJobStatus) -> Iterator[Transition]:
    """Yield what happened between two statuses, in the order in which it happened."""
    yield from _acceptance(old, new)
    yield from _attempts(old, new)
    yield from _progressing(old, new)
    yield from _run(old, new)
    yield from _suspension(old, new)
    if old.state == "Failed" and new.completion_time is None and old.retried != new.retried:
        yield Transition(Reason.Retried, new.message or "", f"{new.retried}")
    before, after = find(old.conditions, ConditionType.Finished), find(new.conditions, ConditionType.Finished)
    if after is not None and before is None and named(after.reason).topic != "acceptance":  # that has its own event
        succeeded = holds(new.conditions, ConditionType.Succeeded)
        # A job that was retried may end again.
        yield Transition(named(after.reason) if succeeded else Reason.Failed, after.message, old.retried or "")


def _acceptance(old: DPOJobStatus, new: DPOJobStatus) -> Iterator[Transition]:
    before, after = find(old.conditions, ConditionType.Accepted), find(new.conditions, ConditionType.Accepted)
    if after is None:
        return
    again = before is not None and before.observed_generation != after.observed_generation and after.status == "False"
    if before is None or again or (before.status, before.reason) != (after.status, after.reason):
        yield Transition(named(after.reason), after.message, f"{after.observed_generation}")


def _attempts(old: DPOJobStatus, new: DPOJobStatus) -> Iterator[Transition]:
    former = {attempt.number: attempt for attempt in old.attempts}
    for index, attempt in enumerate(new.attempts):
        before = former.get(attempt.number)
        if before is None:
            yield Transition(Reason.PyTorchJobCreated, f"Created PyTorchJob {attempt.child}.", f"{attempt.number}")
        if attempt.running_time is not None and (before is None or before.running_time is None):
            text = f"All pods of attempt {attempt.number} are running."
            yield Transition(Reason.TrainingStarted, text, f"{attempt.number}/{_admission(old, attempt)}")
        if attempt.image_ids and (before is None or before.image_ids != attempt.image_ids):
            odd = imageids.difference(attempt, new.attempts[:index])
            if odd is not None:
                yield Transition(Reason.ImagesDiffer, odd, f"{attempt.number}/{_admission(old, attempt)}")
        news = before is None or (before.result, before.reason) != (attempt.result, attempt.reason)
        if attempt.result == "Failed" and news:
            reason = named(attempt.reason)
            text = attempt.message or reason.meaning
            yield Transition(reason, f"Attempt {attempt.number}: {text}", f"{attempt.number}")


def _admission(old: DPOJobStatus, attempt: Attempt) -> str:
    """Return what distinguishes an admission of an attempt from others of it.

    An event's name may depend only on what is stored: after a lost write the pass runs again later. The first admission
    has no time in it, because the attempt itself may not be stored yet, and another operator may have stored it since.
    """
    known = any(stored.number == attempt.number for stored in old.attempts)
    return f"{old.admitted_since}" if known and old.admitted_since != attempt.start_time else ""


def _progressing(old: DPOJobStatus, new: DPOJobStatus) -> Iterator[Transition]:
    before, after = find(old.conditions, ConditionType.Progressing), find(new.conditions, ConditionType.Progressing)
    if after is None or (before is not None and before.reason == after.reason):
        return
    reason = named(after.reason)
    # Suspended and Retried are reported below; the other topics have events of their own.
    own = (Reason.Suspended, Reason.Retried)
    if reason.topic == "progress" and reason.event is not None and reason not in own:
        # A preempted attempt may reach the same reason again, after another admission.
        admission = _admission(old, new.attempts[-1]) if new.attempts else ""
        yield Transition(reason, after.message, f"{new.attempt or 0}/{admission}")


def _run(old: DPOJobStatus, new: DPOJobStatus) -> Iterator[Transition]:
    for kind, bad in INVARIANTS:
        before, after = find(old.conditions, kind), find(new.conditions, kind)
        if after is not None and after.status == bad and (before is None or before.status != bad):
            yield Transition(named(after.reason), after.message, f"{new.attempt or 0}/{_since(before)}")


def checkpoint(old: DPOJobStatus, new: DPOJobStatus, every: int) -> Iterator[Transition]:
    """Yield CheckpointSaved for every tenth checkpoint, of which ``every`` is the distance in steps."""

    def step(status: DPOJobStatus) -> int:
        return status.checkpoint_step or 0

    size = every * CHECKPOINTS_PER_EVENT
    if step(new) // size > step(old) // size:
        text = f"The checkpoint of step {step(new)} is complete."
        yield Transition(Reason.CheckpointSaved, text, f"{step(new) // size}")


def _suspension(old: DPOJobStatus, new: DPOJobStatus) -> Iterator[Transition]:
    before, after = find(old.conditions, ConditionType.Suspended), find(new.conditions, ConditionType.Suspended)
    was, is_now = before is not None and before.status == "True", after is not None and after.status == "True"
    if after is not None and was != is_now:
        reason = Reason.Suspended if is_now else Reason.Resumed
        yield Transition(reason, after.message, f"{new.attempt or 0}/{_since(before)}")


def _since(stored: Condition | None) -> str:
    """Return when a stored condition last changed, which tells one change of it from the next."""
    return stored.last_transition_time if stored is not None else ""


def emit(draft: Draft) -> list[EmitEvent]:
    """Return the events of a pass. They are created before its status is written: a lost write repeats both.

    Those of a status that the pass waits for (``Draft.follow``) come after it: a refused write reports nothing.
    """
    view = draft.view
    found = list(transitions(view.status, draft.status))
    if draft.status.attempts and view.is_readable:  # a spec that cannot be read has no interval to count
        found += checkpoint(view.status, draft.status, view.spec.checkpoint.every_steps)
    if any(isinstance(action, DeleteJob) for action in draft.actions):
        text = "runPolicy.ttlSecondsAfterFinished or its default has passed. The run directory is kept."
        found.append(Transition(Reason.Expired, text))
    return [build(draft, transition) for transition in found]


def build(draft: Draft, transition: Transition) -> EmitEvent:
    """Return one event about a DPOJob."""
    view, (reason, message, detail) = draft.view, transition
    now, component = clock.to_text(draft.now), draft.settings.component
    namespace = view.identity.namespace or "default"
    text = message if len(message) <= MESSAGE_MAX else message[: MESSAGE_MAX - 1] + "…"
    body: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": names.event(view.name, view.uid, reason.value, detail), "namespace": namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": view.name,
            "namespace": namespace,
            "uid": view.uid,
            "resourceVersion": str(view.metadata.get("resourceVersion") or ""),
        },
        "reason": reason.value,
        "message": text,
        "type": reason.event or "Warning",
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "source": {"component": component},
        "reportingComponent": component,
    }
    return EmitEvent(body)
