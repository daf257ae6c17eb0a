"""Checks on the run itself: reference consistent, loss finite, policy learns, steps advance, no process slow."""

from __future__ import annotations

from collections.abc import Collection

from dpo_api.metrics import ACCURACY, MARGIN, SLOWEST_RANK, newest_group
from dpo_api.status import ConditionType, StatusProgress
from dpo_api.texts import numbers
from dpo_operator import clock, limits
from dpo_operator.conditions import Truth, find
from dpo_operator.draft import Draft
from dpo_operator.progress import INT_MAX, said_now
from dpo_operator.reasons import Reason
from dpo_operator.texts import clean

TOLERANCE = 0.02
"""Relative. Equal policy and reference differ by bf16's rounding alone, which averages out over a batch."""
SMALLEST = 0.05
"""Least value that TOLERANCE applies to, for losses that need rewards. They start near 0 where the reward gap is near
0, and then rounding alone is more than 2%.
"""
CHANCE = 0.55

_OF_ATTEMPT = (ConditionType.TrainingStalled, ConditionType.ProgressAvailable, ConditionType.SlowRank)


def apply(draft: Draft) -> None:
    """Set the conditions about the run from the newest progress."""
    progress, attempt = draft.status.progress, draft.attempt
    if progress is None or attempt is None or attempt.result is not None or progress.phase == "starting":
        return
    # Progress of an earlier attempt says nothing about this one.
    if attempt.running_time is None or (progress.observed_at or "") < attempt.running_time:
        return
    _layout(draft)
    _reference(draft)
    _finite(draft, progress)
    if draft.view.spec.dpo.has_preference:
        _learning(draft, progress)
    _stalled(draft, progress, attempt.running_time)
    _slow_rank(draft)


def withdraw(draft: Draft, types: Collection[ConditionType] = _OF_ATTEMPT) -> None:
    """Remove conditions about pods that no longer hold nodes; the attempt still records why it ended."""
    named = {each.value for each in types}
    draft.update(conditions=tuple(c for c in draft.status.conditions if c.type not in named))


def _layout(draft: Draft) -> None:
    """Report what the trainer found when it compared the layout with one process. A wrong one ends the attempt."""
    said = said_now(draft)
    if said is None or not said.layout_verdict:
        return
    truth: Truth = "Unknown" if said.layout_verified is None else "True" if said.layout_verified else "False"
    reasons = {"True": Reason.LayoutAgrees, "False": Reason.LayoutDiffers, "Unknown": Reason.LayoutNotCompared}
    draft.condition(ConditionType.LayoutVerified, truth, reasons[truth], f"Layout {clean(said.layout_verdict, 1024)}.")


def _reference(draft: Draft) -> None:
    """Compare the first loss with its value for a policy equal to the reference; the trainer reports both."""
    said = said_now(draft)  # the trainer reports the two numbers at every step
    if said is None or find(draft.status.conditions, ConditionType.ReferenceConsistent):
        return
    seen, expected = said.first_preference_loss, said.expected_first_preference_loss
    if seen is None or expected is None:
        return
    where = "step 1" if said.step > 0 else "the validation before step 1"
    seen_text, expected_text = numbers(seen, expected)
    needs_rewards = draft.view.spec.dpo.needs_rewards
    if abs(seen - expected) <= TOLERANCE * (max(expected, SMALLEST) if needs_rewards else expected):
        text = f"The loss at {where} is {seen_text}; a policy equal to its reference gives {expected_text}."
        draft.condition(ConditionType.ReferenceConsistent, "True", Reason.PolicyEqualsReference, text)
        return
    text = (
        f"The loss at {where} is {seen_text}, but a policy equal to its reference gives {expected_text}: reference"
        " log-probs, the data or the model do not match. Stop the job and delete the reference cache."
    )
    draft.condition(ConditionType.ReferenceConsistent, "False", Reason.PolicyDiffersFromReference, text)


def _finite(draft: Draft, progress: StatusProgress) -> None:
    """The trainer leaves out a value that is not finite, because JSON has no NaN."""
    if progress.step < 1 or not any(name.startswith("train/") for name in progress.metrics):
        return
    if "train/loss" not in progress.metrics:
        text = f"The loss is not finite at step {progress.step}."
        draft.condition(ConditionType.Finite, "False", Reason.LossNotFinite, text)
    else:
        draft.condition(ConditionType.Finite, "True", Reason.LossFinite, "All losses so far are finite.")


def _learning(draft: Draft, progress: StatusProgress) -> None:
    group = newest_group(progress.metrics)
    accuracy, margin = progress.metrics.get(f"{group}/{ACCURACY}"), progress.metrics.get(f"{group}/{MARGIN}")
    if accuracy is None or margin is None:
        return
    truth: Truth
    source = "validation" if group == "val" else "training"
    if accuracy > CHANCE and margin > 0:
        truth, reason = "True", Reason.AboveChance
        text = "Accuracy and margin are above chance."
    elif progress.step < draft.settings.learning_after_steps:
        if find(draft.status.conditions, ConditionType.Learning) is not None:
            return
        truth, reason = "Unknown", Reason.TooEarly
        text = f"Evaluated after step {draft.settings.learning_after_steps}."
    elif margin < 0:
        truth, reason = "False", Reason.MarginNegative
        text = f"The {source} margin is negative: rejected responses have the higher reward. Are they swapped?"
    else:
        truth, reason = "False", Reason.AtChance
        text = f"The {source} accuracy is still at chance."
    draft.condition(ConditionType.Learning, truth, reason, text)


def _stalled(draft: Draft, progress: StatusProgress, running_time: str) -> None:
    """Only a trainer that answers can be seen to have stalled."""
    if progress.changed_at is None or progress.observed_at is None:
        return
    since = max(progress.changed_at, running_time)
    still = clock.to_moment(progress.observed_at) - clock.to_moment(since)
    limit = draft.view.spec.run_policy.stall_timeout_seconds or draft.settings.stalled_after_seconds
    if still < limit:
        draft.condition(ConditionType.TrainingStalled, "False", Reason.StepsAdvance, "Steps are advancing.")
    elif limits.is_counted(progress):
        text = f"No progress since {since}: phase {progress.phase}, step {progress.step}."
        draft.condition(ConditionType.TrainingStalled, "True", Reason.NoStep, text)
    else:  # a long checkpoint or export: whether it advances is unknown
        withdraw(draft, (ConditionType.TrainingStalled,))


def _slow_rank(draft: Draft) -> None:
    """Report the process that the trainer calls slow, once for each: its figures change with every answer."""
    said = said_now(draft)
    if said is None or SLOWEST_RANK not in said.metrics:
        return
    if said.slow_rank is None:
        text = "No process is much slower than the others."
        draft.condition(ConditionType.SlowRank, "False", Reason.RanksKeepPace, text)
        return
    rank = f"Rank {min(said.slow_rank, INT_MAX)} "
    known = find(draft.status.conditions, ConditionType.SlowRank)
    if known is not None and known.status == "True" and known.message.startswith(rank):
        return
    host = clean(said.slow_rank_host, 253)
    where = f"on {host} " if host else ""
    times = "many" if said.slow_rank_ratio is None else f"{min(said.slow_rank_ratio, 1e6):.1f}"
    text = f"{rank}{where}takes {times} times as long as the median for its own part of a step."
    draft.condition(ConditionType.SlowRank, "True", Reason.RankIsSlow, text)
