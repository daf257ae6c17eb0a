"""How a job ends: the conditions Finished, Succeeded, Failed and Stalled, and the results that the status keeps."""

from __future__ import annotations

from dpo_api.progress import LastWords
from dpo_api.status import ConditionType, State, StatusProgress
from dpo_operator import conditions, progress
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason
from dpo_operator.texts import clean


def succeed(draft: Draft, words: LastWords) -> None:
    """End the job with its model; the final values come from rank 0's termination message."""
    former = draft.status.progress
    metrics = progress.bounded({**(former.metrics if former is not None else {}), **words.metrics})
    final = (former or StatusProgress(phase="done")).model_copy(
        update={
            "phase": "done",
            "step": words.step,
            "total": words.total,
            "eta_seconds": 0,
            "done": None,
            "of": None,
            "message": None,
            "metrics": metrics,
            "best": progress.best_of(words.best),
            "observed_at": draft.moment,
        }
    )
    draft.update(
        progress=final,
        final_metrics=final.metrics,
        model_uri=progress.fitting_uri(words.model_uri),
        hub_uri=progress.fitting_uri(words.hub_uri),
        model_step=words.model_step,
        run_directory=progress.fitting_uri(words.run_dir) or draft.status.run_directory,
        summary=progress.summarise(final),
    )
    of = "" if words.model_step in (None, words.step) else f" of step {words.model_step}"
    where = f"; the model{of} is at {words.model_uri}" if draft.status.model_uri else ""
    if (
        words.already_complete and draft.attempt is not None and draft.attempt.number == 1
    ):  # a later attempt finds the export of an earlier one
        text = f"The run directory already held this run, finished after step {words.step}{where}."
        _end(draft, Reason.AlreadyComplete, text, "Succeeded")
        return
    if words.stopped_early:
        why = clean(words.stopped_early, 1024)
        text = f"Stopped early after step {words.step} of {words.total}: {why}{where}."
        _end(draft, Reason.StoppedEarly, text, "Succeeded")
        return
    _end(draft, Reason.Succeeded, f"Finished after step {words.step} of {words.total}{where}.", "Succeeded")


def fail(draft: Draft, reason: Reason, message: str) -> None:
    """End the job without a model, or with one that could not be pushed."""
    former = draft.status.progress
    if former is not None:
        draft.update(final_metrics=dict(former.metrics))
    if reason is Reason.NonFinite:
        draft.condition(ConditionType.Finite, "False", Reason.LossNotFinite, message)
    if reason is Reason.WrongLayout:
        draft.condition(ConditionType.LayoutVerified, "False", Reason.LayoutDiffers, message)
    _end(draft, reason, message, "Failed")


def reject(draft: Draft, reason: Reason, message: str) -> None:
    """End a job that was never accepted. An edit of its spec makes it go on."""
    _end(draft, reason, message, "Rejected")


def reopen(draft: Draft) -> None:
    """Make an ended job go on: nothing says any more that, how or when it ended.

    Attempts and budgets stay as they are. The time to live starts again at the next end, because it is counted from
    ``completion_time``.
    """
    kept = conditions.without(
        draft.status.conditions,
        ConditionType.Finished,
        ConditionType.Succeeded,
        ConditionType.Failed,
        ConditionType.Stalled,
    )
    draft.update(conditions=kept, completion_time=None, next_attempt_time=None, final_metrics={})


def _end(draft: Draft, reason: Reason, message: str, state: State) -> None:
    ended = draft.status.completion_time or draft.moment
    draft.update(completion_time=ended, next_attempt_time=None, admitted_since=None, starting_seconds=None)
    draft.place(state, reason, message, progressing=False)
    succeeded = state == "Succeeded"
    draft.condition(ConditionType.Finished, "True", reason, message)
    draft.condition(ConditionType.Succeeded, "True" if succeeded else "False", reason, message)
    draft.condition(ConditionType.Failed, "False" if succeeded else "True", reason, message)
    if not succeeded:  # a condition of its kind is there only while it is True
        draft.condition(ConditionType.Stalled, "True", reason, message)
