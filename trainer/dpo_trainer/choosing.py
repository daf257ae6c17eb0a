"""Which checkpoint is the best, and when a run ends early. Decided from each validation, the same on all ranks.

A checkpoint's marker holds the state, so a resumed run goes on with the best so far and the validations waited.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from dpo_api.metrics import LOWER_IS_BETTER, Monitored
from dpo_api.progress import Best
from dpo_api.spec import DPOJobSpec
from dpo_api.texts import counted, figure, number


class Chooser:
    """The best validation so far by ``checkpoint.monitor``, and whether ``training.earlyStopping`` ends the run.

    Nothing is exchanged: all ranks have the same sums of a validation.
    """

    def __init__(self, spec: DPOJobSpec) -> None:
        self._monitor = spec.checkpoint.monitor
        self._early = spec.training.early_stopping
        asked = None if self._early is None else self._early.monitor
        self._early_monitor: Monitored = asked or self._monitor or "val/loss"
        self.best: Best | None = None
        self._improved: Best | None = None  #: the last improvement, for early stopping
        self._waited = 0  #: validations since then

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a validation after ``step`` steps, with metrics as ``val/loss``.

        That before the first step does not count, since no checkpoint has its weights. A value that is not finite is
        no improvement, and of equal values the first is the best.
        """
        if step == 0:
            return
        if self._monitor is not None:
            self.best = _better(self.best, _measured(self._monitor, step, metrics), self._monitor)
        if self._early is not None:
            former, new = self._improved, _measured(self._early_monitor, step, metrics)
            self._improved = _better(former, new, self._early_monitor, self._early.min_delta)
            self._waited = self._waited + 1 if self._improved is former else 0

    @property
    def stops_early(self) -> str:
        """Why the run ends now, without a full stop; empty if it does not."""
        early, last, waited = self._early, self._improved, self._waited
        if early is None or waited < early.patience:
            return ""
        if last is None:
            return f"{self._early_monitor} was not finite in {counted(waited, 'validation')}"
        more = f" by more than {number(early.min_delta)}" if early.min_delta else ""
        return (
            f"{last.metric} has not improved{more} in {counted(waited, 'validation')} since step {last.step}, where it"
            f" was {figure(last.value)}"
        )

    def state(self) -> dict[str, Any]:
        """Return the state as JSON's types, for a checkpoint's marker."""
        return {"best": _to_json(self.best), "improved": _to_json(self._improved), "waited": self._waited}

    @staticmethod
    def best_step(state: Mapping[str, Any]) -> int | None:
        """Return the step of the best checkpoint in a marker's state; None if there is none."""
        best = _from_json(state.get("best"))
        return None if best is None else best.step

    def restore(self, state: Mapping[str, Any], checkpoints: Collection[int]) -> list[str]:
        """Take the state of a checkpoint's marker; return warnings about it.

        checkpoints: steps of those that exist. What another metric was the best by, and a best checkpoint that is no
        longer there, are forgotten.
        """
        improved = _from_json(state.get("improved"))
        if improved is None or improved.metric == self._early_monitor:
            self._improved, self._waited = improved, int(state.get("waited", 0))
        best = _from_json(state.get("best"))
        if self._monitor is None or best is None or best.metric != self._monitor:
            return []
        if best.step not in checkpoints:
            text = f"the best checkpoint so far, of step {best.step}, is no longer there: the best one is chosen from"
            return [f"{text} those that follow"]
        self.best = best
        return []


def _measured(metric: Monitored, step: int, metrics: Mapping[str, float]) -> Best:
    return Best(metric=metric, step=step, value=metrics.get(metric, math.nan))


def _better(former: Best | None, new: Best, metric: Monitored, by: float = 0.0) -> Best | None:
    """Return the new value if it is better than the former by more than ``by``, else the former."""
    if not math.isfinite(new.value):
        return former
    if former is None:
        return new
    gain = former.value - new.value if LOWER_IS_BETTER[metric] else new.value - former.value
    return new if gain > by else former


def _to_json(best: Best | None) -> dict[str, Any] | None:
    return None if best is None else best.model_dump()


def _from_json(found: Any) -> Best | None:
    return None if found is None else Best.model_validate(found)
