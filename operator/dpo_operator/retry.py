"""Retries a failed job on request: its annotation ``dpo-operator.dev/retry`` has a value that was not there before."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_api.status import ConditionType
from dpo_operator import acceptance, ends, invariants, labels, restarts
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason

VALUE_MAX = 256
"""The status keeps this much of a value; more does not tell one value from another."""


def note(draft: Draft) -> None:
    """Record the value that an unfinished job has. It asks for nothing: a manifest may still have an earlier one."""
    value = _value(draft)
    if value is not None and value != draft.status.retried:
        draft.update(retried=value)


def is_due(draft: Draft) -> bool:
    """Whether a retry is asked for. Only an accepted job that failed is retried."""
    value = _value(draft)
    wanted = value is not None and value != draft.status.retried
    return wanted and draft.status.state == "Failed" and acceptance.is_accepted(draft)


def start(draft: Draft) -> None:
    """Open the job again, with budgets as for a new one. The next pass, after this is stored, creates the attempt."""
    last = draft.attempt.number if draft.attempt is not None else 0
    place = restarts.starting_point(draft)
    ends.reopen(draft)
    # What was found out about the last attempt's losses ended the job; the next one has losses of its own.
    invariants.withdraw(draft, (ConditionType.Finite,))
    draft.update(retried=_value(draft), retried_attempt=last, charged_restarts=0, admitted_seconds=0)
    text = f"The job is retried ({labels.RETRY}). Attempt {last + 1} continues from {place}."
    draft.place("Restarting", Reason.Retried, text)
    draft.wake_in(0)


def _value(draft: Draft) -> str | None:
    annotations = draft.view.metadata.get("annotations")
    value = annotations.get(labels.RETRY) if isinstance(annotations, Mapping) else None
    return value[:VALUE_MAX] if isinstance(value, str) and value else None
