"""The alerts, as data. Each names its job and links to a page with the steps to check, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dpo_monitoring.queries import ATTEMPT, JOB, metric
from dpo_operator.config import Settings
from dpo_operator.invariants import CHANCE
from dpo_operator.runtime.options import Options

RUNBOOKS = "https://github.com/dpo-operator/dpo-operator/blob/main/docs/alerts"
GROUP = "dpo-operator"

STALLED_SECONDS = 1800
CHECKPOINT_SECONDS = 7200
EARLIEST_STEP = Settings().learning_after_steps
BLIND_SECONDS = 4 * int(Options().relist_seconds)


@dataclass(frozen=True)
class Alert:
    """One rule."""

    name: str
    severity: Literal["critical", "warning"]
    hold: str
    """How long the expression must hold."""
    expr: str
    parts: tuple[str, ...]
    """The expressions that ``expr`` compares. Each has a value for healthy jobs, so tests can evaluate them."""
    summary: str
    description: str

    @property
    def rule(self) -> dict[str, Any]:
        """The rule as Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.hold,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{RUNBOOKS}/{self.name}.md",
            },
        }


def _of_job(name: str, selector: str = "", by: tuple[str, ...] = JOB) -> str:
    """Return a series by job, so that two pods, or two operators during an upgrade, count once."""
    return f"max by ({', '.join(by)}) ({metric(name).name}{selector})"


def _condition(name: str) -> str:
    return _of_job("dpo_job_condition", f'{{condition="{name}"}}')


def _newest(name: str) -> str:
    """Return the validation's value if there is one, else the mean of half an hour of training."""
    training = metric(f"dpo_train_{name}").name
    return f"({_of_job(f'dpo_val_{name}')} or max by ({', '.join(JOB)}) (avg_over_time({training}[30m])))"


_STEPS = _of_job("dpo_train_steps_total")
_PLANNED = _of_job("dpo_train_planned_steps")
_LATE_ENOUGH = f"{_STEPS} >= {EARLIEST_STEP}"
_JOB_IS = "{{ $labels.namespace }}/{{ $labels.dpojob }}"


def _stalled() -> Alert:
    signs = (
        "dpo_train_last_step_timestamp_seconds",
        "dpo_val_last_run_timestamp_seconds",
        "dpo_checkpoint_last_success_timestamp_seconds",
    )
    names = "|".join(metric(name).name for name in signs)
    still = f'time() - max by ({", ".join(JOB)}) ({{__name__=~"{names}"}})'
    seen, answers = _condition("TrainingStalled"), _condition("ProgressAvailable")
    runs = _of_job("dpo_job_state", '{state="Running"}')
    return Alert(
        "DPOTrainingStalled",
        "critical",
        "5m",
        f"({seen} == 1 and {runs})\n"
        f"or (\n  {still} > {STALLED_SECONDS}\n  and {_STEPS} < {_PLANNED}\n"
        f"  unless ({seen} == 0 and {answers} == 1)\n)",
        (seen, answers, runs, still, _STEPS, _PLANNED),
        f"{_JOB_IS} holds its nodes but does not train",
        "No step, validation or checkpoint has finished for a long time, and the operator sees no other phase that"
        " would explain it.",
    )


def _non_finite() -> Alert:
    seen = _condition("Finite")
    losses = [_of_job(name) for name in ("dpo_train_loss", "dpo_val_loss")]
    nan = "".join(f"\nor ({loss} != {loss})" for loss in losses)
    return Alert(
        "DPOTrainingNonFinite",
        "critical",
        "0m",
        # A failed job keeps its condition until it is deleted, so the alert resolves after six hours.
        f"({seen} == 0 unless (max_over_time(({seen})[30m:1m] offset 6h) == 0)){nan}",
        (seen, *losses),
        f"{_JOB_IS}: a loss or a gradient is NaN or infinite",
        "The trainer stops before such a step changes any weight. The job fails, because the step would fail again.",
    )


def _not_rising() -> Alert:
    value = _newest("reward_accuracy_ratio")
    return Alert(
        "DPOAccuracyNotRising",
        "warning",
        "15m",
        f"{value} <= {CHANCE}\nand {_LATE_ENOUGH}",
        (value, _STEPS),
        f"{_JOB_IS} is not learning: accuracy {{{{ $value | humanizePercentage }}}} after {EARLIEST_STEP} steps",
        f"The accuracy is still at chance (at most {CHANCE}); it should have risen by now.",
    )


def _negative_margin() -> Alert:
    value = _newest("reward_margin")
    return Alert(
        "DPORewardMarginNegative",
        "warning",
        "15m",
        f"{value} < 0\nand {_LATE_ENOUGH}",
        (value, _STEPS),
        f'{_JOB_IS} gives rejected responses higher rewards than chosen ones: margin {{{{ $value | printf "%.3f" }}}}',
        "The mean reward margin is negative; it should be positive by now. Chosen and rejected may be swapped.",
    )


def _checkpoint_old() -> Alert:
    steps = _of_job("dpo_train_steps_total", by=ATTEMPT)
    before = _of_job("dpo_train_steps_total", f" offset {CHECKPOINT_SECONDS // 3600}h", by=ATTEMPT)
    saved = _of_job("dpo_checkpoint_last_step", by=ATTEMPT)
    return Alert(
        "DPOCheckpointTooOld",
        "warning",
        "10m",
        # Not the age of the checkpoint: an attempt that resumes after a week has not lost anything.
        f"{before} > {saved}\nor ({steps} and {before} unless {saved})",
        (steps, saved),
        f"{_JOB_IS} has not saved a checkpoint for more than {CHECKPOINT_SECONDS // 3600} hours",
        "If a node is lost now, all steps since the last checkpoint are lost.",
    )


def _pending() -> Alert:
    # Restarting too: the start time-out ends an attempt without nodes after about the time of this alert.
    waiting = _of_job("dpo_job_state", '{state=~"Pending|Queued|Starting|Restarting"}')
    return Alert(
        "DPOJobPendingTooLong",
        "warning",
        "30m",
        waiting,
        (waiting,),
        f"{_JOB_IS} has waited for its nodes for half an hour",
        "It is queued, or its pods are not scheduled, cannot pull their image, or do not find each other.",
    )


def _restart_loop() -> Alert:
    changes = f"sum by ({', '.join(JOB)}) (changes({metric('dpo_job_attempt').name}[1h]))"
    return Alert(
        "DPOJobRestartLoop",
        "warning",
        "0m",
        f"{changes} >= 3",
        (changes,),
        f"{_JOB_IS} has started {{{{ $value }}}} attempts within an hour",
        "Attempts keep failing. Each one loses the steps since its checkpoint and has to start all pods again.",
    )


def _operator_down() -> Alert:
    alive, dead = f"max({metric('dpo_operator_info').name})", f"max({metric('dpo_operator_watches_dead').name})"
    synced = f"max({metric('dpo_operator_synced').name})"
    checked = f"time() - max({metric('dpo_operator_watch_checked_timestamp_seconds').name})"
    return Alert(
        "DPOOperatorDown",
        "critical",
        "5m",
        # Filling the caches takes seconds, less than `for`, also when a CRD is added or removed.
        f"absent({alive})\nor {dead} > 0\nor {synced} == 0\nor {checked} > {BLIND_SECONDS}",
        (alive, dead, synced, checked),
        "The DPO operator is down or cannot see the cluster",
        "Running jobs continue, but no job is accepted, restarted or updated until it is back.",
    )


ALERTS: tuple[Alert, ...] = (
    _stalled(),
    _non_finite(),
    _not_rising(),
    _negative_margin(),
    _checkpoint_old(),
    _pending(),
    _restart_loop(),
    _operator_down(),
)


def rules() -> dict[str, Any]:
    """Return the content of a Prometheus rule file, which is also the spec of a PrometheusRule."""
    return {"groups": [{"name": GROUP, "rules": [alert.rule for alert in ALERTS]}]}
