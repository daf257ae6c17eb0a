"""The alerts, as data. Each names its job and links to a page with the steps to check, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo_monitoring.queries import ATTEMPT, CLUSTER, JOB, metric
from dpo_operator.config import Settings
from dpo_operator.invariants import CHANCE
from dpo_operator.runtime.options import Options

RUNBOOKS = "https://github.com/dpo-operator/dpo-operator/blob/main/docs/alerts"
GROUP = "dpo-operator"

NAMED = "@{}@"
"""How a text names a threshold, such as @seconds@; the chart replaces it by the installation's value."""


@dataclass(frozen=True)
class Alert:
    """One rule. Its texts hold the default thresholds."""

    name: str
    severity: Literal["critical", "warning"]
    hold: str
    """How long the expression must hold."""
    expr: str
    parts: tuple[str, ...]
    """The expressions that ``expr`` compares. Each has a value for healthy jobs, so tests can evaluate them."""
    summary: str
    description: str
    thresholds: Mapping[str, float]
    """The numbers that an installation can set, with their defaults."""
    template: Mapping[str, Any]
    """The rule as Prometheus reads it, with names in place of the thresholds."""

    @property
    def rule(self) -> dict[str, Any]:
        """The rule as Prometheus reads it, with the default thresholds."""
        return _rule(self.name, self.severity, self.hold, self.expr, self.summary, self.description)


def _rule(name: str, severity: str, hold: str, expr: str, summary: str, description: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": hold,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description, "runbook_url": f"{RUNBOOKS}/{name}.md"},
    }


def _alert(
    name: str,
    severity: Literal["critical", "warning"],
    hold: str,
    expr: str,
    parts: tuple[str, ...],
    summary: str,
    description: str,
    **thresholds: float,
) -> Alert:
    """Return an alert from texts that name its thresholds."""

    def fill(text: str) -> str:
        for threshold, value in thresholds.items():
            text = text.replace(NAMED.format(threshold), str(value))
        return text

    template = _rule(name, severity, hold, expr, summary, description)
    texts = (fill(expr), tuple(map(fill, parts)), fill(summary), fill(description))
    return Alert(name, severity, hold, *texts, thresholds, template)


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
_LATE_ENOUGH = f"{_STEPS} >= @afterSteps@"
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
    return _alert(
        "DPOTrainingStalled",
        "critical",
        "5m",
        f"({seen} == 1 and {runs})\n"
        f"or (\n  {still} > @seconds@\n  and {_STEPS} < {_PLANNED}\n"
        f"  unless ({seen} == 0 and {answers} == 1)\n)",
        (seen, answers, runs, still, _STEPS, _PLANNED),
        f"{_JOB_IS} holds its nodes but does not train",
        "No step, validation or checkpoint has finished for a long time, and the operator sees no other phase that"
        " would explain it.",
        seconds=1800,
    )


def _non_finite() -> Alert:
    seen = _condition("Finite")
    losses = [_of_job(name) for name in ("dpo_train_loss", "dpo_val_loss")]
    nan = "".join(f"\nor ({loss} != {loss})" for loss in losses)
    return _alert(
        "DPOTrainingNonFinite",
        "critical",
        "0m",
        # A failed job keeps its condition until it is deleted, so the alert resolves after some hours.
        f"({seen} == 0 unless (max_over_time(({seen})[30m:1m] offset @resolveAfterHours@h) == 0)){nan}",
        (seen, *losses),
        f"{_JOB_IS}: a loss or a gradient is NaN or infinite",
        "The trainer stops before such a step changes any weight. The job fails, because the step would fail again.",
        resolveAfterHours=6,
    )


def _not_rising() -> Alert:
    value = _newest("reward_accuracy_ratio")
    return _alert(
        "DPOAccuracyNotRising",
        "warning",
        "15m",
        f"{value} <= @accuracy@\nand {_LATE_ENOUGH}",
        (value, _STEPS),
        f"{_JOB_IS} is not learning: accuracy {{{{ $value | humanizePercentage }}}} after @afterSteps@ steps",
        "The accuracy is still at chance (at most @accuracy@); it should have risen by now.",
        accuracy=CHANCE,
        afterSteps=Settings().learning_after_steps,
    )


def _negative_margin() -> Alert:
    value = _newest("reward_margin")
    return _alert(
        "DPORewardMarginNegative",
        "warning",
        "15m",
        f"{value} < @margin@\nand {_LATE_ENOUGH}",
        (value, _STEPS),
        f'{_JOB_IS} gives rejected responses higher rewards than chosen ones: margin {{{{ $value | printf "%.3f" }}}}',
        "The mean reward margin is negative; it should be positive by now. Chosen and rejected may be swapped.",
        margin=0,
        afterSteps=Settings().learning_after_steps,
    )


def _checkpoint_old() -> Alert:
    steps = _of_job("dpo_train_steps_total", by=ATTEMPT)
    before = _of_job("dpo_train_steps_total", " offset @hours@h", by=ATTEMPT)
    saved = _of_job("dpo_checkpoint_last_step", by=ATTEMPT)
    return _alert(
        "DPOCheckpointTooOld",
        "warning",
        "10m",
        # Not the age of the checkpoint: an attempt that resumes after a week has not lost anything.
        f"{before} > {saved}\nor ({steps} and {before} unless {saved})",
        (steps, saved),
        f"{_JOB_IS} has not saved a checkpoint for more than @hours@ hours",
        "If a node is lost now, all steps since the last checkpoint are lost.",
        hours=2,
    )


def _pending() -> Alert:
    # Restarting too: the start time-out ends an attempt without nodes after about the time of this alert. A short stay
    # in a queue between two attempts changes nothing, so what counts is the last five minutes.
    waiting = _of_job("dpo_job_state", '{state=~"Pending|Starting|Restarting"}')
    lately = f"max_over_time(({waiting})[5m:1m])"
    other = _of_job("dpo_job_state", '{state!~"Pending|Queued|Starting|Restarting"}')
    return _alert(
        "DPOJobPendingTooLong",
        "warning",
        "30m",
        f"{lately} unless {other}",
        (lately, other),
        f"{_JOB_IS} lacks nodes, or its pods do not start",
        "Its pods are not scheduled, cannot pull their image, or do not find each other. It is not waiting in a queue.",
    )


def _queued() -> Alert:
    waiting = _of_job("dpo_job_state", '{state="Queued"}')
    return _alert(
        "DPOJobQueuedTooLong",
        "warning",
        "24h",
        waiting,
        (waiting,),
        f"{_JOB_IS} has waited in its queue for a long time",
        "Its queue has had no room, or cannot admit it at all.",
    )


def _ended(name: str, hold: str, state: str, summary: str, description: str) -> Alert:
    """Return an alert about jobs in a final state, which they keep until they are deleted: it resolves after hours."""
    ended = _of_job("dpo_job_state", f'{{state="{state}"}}')
    return _alert(
        name,
        "warning",
        hold,
        f"{ended} unless max_over_time(({ended})[30m:1m] offset @resolveAfterHours@h)",
        (ended,),
        f"{_JOB_IS} {summary}",
        description,
        resolveAfterHours=6,
    )


def _restart_loop() -> Alert:
    changes = f"sum by ({', '.join(JOB)}) (changes({metric('dpo_job_attempt').name}[1h]))"
    return _alert(
        "DPOJobRestartLoop",
        "warning",
        "0m",
        f"{changes} >= @attempts@",
        (changes,),
        f"{_JOB_IS} has started {{{{ $value }}}} attempts within an hour",
        "Attempts keep failing. Each one loses the steps since its checkpoint and has to start all pods again.",
        attempts=3,
    )


def _operator_down() -> Alert:
    def by_cluster(name: str) -> str:
        return f"max by ({CLUSTER}) ({metric(name).name})"

    alive = f"max({metric('dpo_operator_info').name})"
    dead, synced = by_cluster("dpo_operator_watches_dead"), by_cluster("dpo_operator_synced")
    checked = f"time() - {by_cluster('dpo_operator_watch_checked_timestamp_seconds')}"
    return _alert(
        "DPOOperatorDown",
        "critical",
        "5m",
        # Filling the caches takes seconds, less than `for`, also when a CRD is added or removed.
        f"absent({alive})\nor {dead} > 0\nor {synced} == 0\nor {checked} > @seconds@",
        (alive, dead, synced, checked),
        "The DPO operator is down or cannot see the cluster",
        "Running jobs continue, but no job is accepted, restarted or updated until it is back.",
        seconds=4 * int(Options().relist_seconds),
    )


ALERTS: tuple[Alert, ...] = (
    _stalled(),
    _non_finite(),
    _not_rising(),
    _negative_margin(),
    _checkpoint_old(),
    _pending(),
    _queued(),
    _ended(
        "DPOJobFailed",
        "0m",
        "Failed",
        "has failed",
        "It ended without a model, or could not push it."
        " The condition Failed says why, and `status.attempts` how each attempt ended.",
    ),
    _ended(
        "DPOJobRejected",
        "15m",
        "Rejected",
        "is rejected",
        "Its spec cannot run. The condition Accepted lists every error with its fix.",
    ),
    _restart_loop(),
    _operator_down(),
)


def rules() -> dict[str, Any]:
    """Return the content of a Prometheus rule file, which is also the spec of a PrometheusRule."""
    return {"groups": [{"name": GROUP, "rules": [alert.rule for alert in ALERTS]}]}


def templates() -> dict[str, Any]:
    """Return what the chart makes its PrometheusRule of: each rule, with the default of each threshold."""
    alerts = [{"rule": alert.template, "thresholds": dict(alert.thresholds)} for alert in ALERTS]
    return {"group": GROUP, "alerts": alerts}
