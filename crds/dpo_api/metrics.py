"""The one table of metrics: their names in Prometheus and in metrics.jsonl, what they mean and their unit.

The trainer exports exactly METRICS from rank 0, the operator exactly OPERATOR; dashboards, alerts, reports and docs use
no other names. On a cluster every series of a run also carries the labels of RUN_LABELS. Prometheus names hold base
units and ratios from 0 to 1; a step is a value, never a label. Rewards are beta times the policy's
log-prob minus the reference's, summed over the response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One series."""

    name: str
    """Name in Prometheus; counters end in ``_total``."""
    kind: Kind
    help: str
    """One sentence: meaning and unit."""
    key: str | None = None
    """Key in metrics.jsonl and in Progress.metrics; None where the series has none there."""
    labels: tuple[str, ...] = ()
    """Label names with few values; every series also has the scrape's own labels."""


_SHARED: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", "Loss that is minimised, per pair, mean over the {batch}."),
    ("preference_loss", "preference_loss", "Preference loss before its weight, mean over the {batch}."),
    ("sft_loss", "sft_loss", "Negative log-prob of the chosen response before its weight, mean over the {batch}."),
    ("reward_accuracy_ratio", "acc", "Share of pairs whose chosen reward exceeds the rejected one, over the {batch}."),
    ("reward_chosen", "rewards_chosen_mean", "Mean reward of the chosen responses over the {batch}."),
    ("reward_rejected", "rewards_rejected_mean", "Mean reward of the rejected responses over the {batch}."),
    ("reward_margin", "rewards_margin", "Mean chosen reward minus mean rejected reward over the {batch}."),
    ("reward_mean", "rewards_all_mean", "Mean reward of all responses over the {batch}."),
    ("reward_stddev", "rewards_all_std", "Standard deviation of all responses' rewards over the {batch}."),
)


def _shared(group: Literal["train", "val"], batch: str) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"dpo_{group}_{name}", "gauge", text.format(batch=batch), f"{group}/{key}")
        for name, key, text in _SHARED
    )


TRAIN: tuple[Metric, ...] = (
    *_shared("train", "step's global batch"),
    Metric("dpo_train_grad_norm", "gauge", "Norm of the whole gradient before clipping.", "train/grad_norm"),
    Metric("dpo_train_learning_rate", "gauge", "Learning rate of the last step.", "train/lr"),
    Metric("dpo_train_step_duration_seconds", "gauge", "Duration of the last step in seconds.", "train/step_time"),
    Metric(
        "dpo_train_tokens_per_second",
        "gauge",
        "Tokens computed a second in the last step, all processes.",
        "train/tokens_per_second",
    ),
    Metric("dpo_train_epoch", "gauge", "Epochs done, with a fraction.", "train/epoch"),
    Metric("dpo_train_steps_total", "counter", "Optimizer steps done in this run, earlier attempts included.", "step"),
    Metric("dpo_train_samples_total", "counter", "Pairs trained on, repetitions counted.", "train/consumed_samples"),
    Metric("dpo_train_tokens_total", "counter", "Tokens computed in training by this attempt, all processes."),
    Metric("dpo_train_planned_steps", "gauge", "Optimizer steps that the run will have."),
    Metric("dpo_train_last_step_timestamp_seconds", "gauge", "Unix time of the last optimizer step."),
)
"""Training, one value a step."""

VAL: tuple[Metric, ...] = (
    *_shared("val", "validation pairs"),
    Metric(
        "dpo_val_step_duration_seconds",
        "gauge",
        "Duration of the last validation in seconds.",
        "val/validation_step_time",
    ),
    Metric("dpo_val_last_run_timestamp_seconds", "gauge", "Unix time of the last validation's end."),
)
"""Validation, one value each time."""

RUN: tuple[Metric, ...] = (
    Metric("dpo_data_wait_seconds_total", "counter", "Seconds that steps waited for data."),
    Metric("dpo_data_pairs", "gauge", "Usable training pairs."),
    Metric("dpo_data_dropped_pairs", "gauge", "Training records left out, by reason.", labels=("reason",)),
    Metric("dpo_checkpoint_last_success_timestamp_seconds", "gauge", "Unix time of the newest complete checkpoint."),
    Metric("dpo_checkpoint_last_step", "gauge", "Step of the newest complete checkpoint."),
    Metric("dpo_trainer_info", "gauge", "Always 1; its labels describe the run.", labels=("version", "dpojob")),
)
"""The run itself."""

METRICS: tuple[Metric, ...] = (*TRAIN, *VAL, *RUN)
"""Everything that rank 0 exports."""

BY_KEY: dict[str, Metric] = {metric.key: metric for metric in METRICS if metric.key is not None}
"""The series of each metrics.jsonl key."""

JSONL_ONLY: dict[str, str] = {
    "val/<name>/<metric>": "The same metric over one validation source, where there are several.",
}
"""Keys of metrics.jsonl that have no series in Prometheus."""

RUN_LABELS: tuple[str, ...] = ("namespace", "dpojob", "attempt")
"""Labels by which a run's series are told apart; the chart's PodMonitor takes them from the pod. What the operator says
about one DPOJob has the first two.
"""

_JOB = ("namespace", "dpojob")

OPERATOR: tuple[Metric, ...] = (
    Metric("dpo_operator_info", "gauge", "Always 1; its labels describe the operator.", labels=("version",)),
    Metric("dpo_operator_jobs", "gauge", "DPOJobs by namespace and state.", labels=("namespace", "state")),
    Metric("dpo_operator_gpus", "gauge", "GPUs that running attempts hold.", labels=("namespace",)),
    Metric("dpo_operator_restarts_total", "counter", "Attempts that ended in failure, by class.", labels=("class",)),
    Metric("dpo_operator_reconcile_duration_seconds", "histogram", "Duration of a pass over one DPOJob."),
    Metric(
        "dpo_operator_reconcile_errors_total",
        "counter",
        "Passes that failed and are repeated, by cause.",
        labels=("cause",),
    ),
    Metric("dpo_operator_queue_depth", "gauge", "DPOJobs that wait for a pass."),
    Metric("dpo_operator_queue_oldest_seconds", "gauge", "Wait of the DPOJob that waits longest."),
    Metric("dpo_operator_watches_dead", "gauge", "Kinds whose watch is dead."),
    Metric("dpo_operator_watch_restarts", "gauge", "Times that the watches were started anew."),
    Metric(
        "dpo_operator_watch_checked_timestamp_seconds",
        "gauge",
        "Unix time at which the watches were last compared with the cluster.",
    ),
    Metric("dpo_operator_synced", "gauge", "1 once the caches are filled."),
    Metric("dpo_operator_backend_installed", "gauge", "1 where the cluster knows PyTorchJob."),
    Metric("dpo_operator_scrape_failures", "gauge", "Trainers that did not answer, so far."),
    Metric("dpo_operator_process_resident_memory_bytes", "gauge", "Memory of the operator's process."),
    Metric("dpo_operator_process_virtual_memory_bytes", "gauge", "Address space of the operator's process."),
    Metric("dpo_operator_process_open_fds", "gauge", "Files and connections that the operator's process holds open."),
    Metric("dpo_operator_process_max_fds", "gauge", "Files and connections that it may hold open."),
    Metric("dpo_operator_process_cpu_seconds_total", "counter", "CPU time of the operator's process."),
    Metric("dpo_operator_process_start_time_seconds", "gauge", "Unix time at which the operator's process began."),
    Metric("dpo_job_state", "gauge", "Always 1; the label says the DPOJob's state.", labels=(*_JOB, "state")),
    Metric(
        "dpo_job_condition",
        "gauge",
        "1 while the condition is True, 0 while it is False; of conditions about the run itself.",
        labels=(*_JOB, "condition"),
    ),
    Metric("dpo_job_attempt", "gauge", "Number of the current or last attempt.", labels=_JOB),
    Metric(
        "dpo_job_queue_seconds",
        "gauge",
        "Seconds from the creation of the newest attempt until all its pods ran; it grows while they do not.",
        labels=_JOB,
    ),
    Metric("dpo_job_gpu_seconds_total", "counter", "GPUs times seconds that attempts have run.", labels=_JOB),
    Metric("dpo_job_step", "gauge", "Optimizer steps done.", labels=_JOB),
    Metric("dpo_job_accuracy_ratio", "gauge", "Newest accuracy: of validation if there is one.", labels=_JOB),
    Metric("dpo_job_reward_margin", "gauge", "Newest reward margin, from where the accuracy is.", labels=_JOB),
    Metric("dpo_job_loss", "gauge", "Newest loss, from where the accuracy is.", labels=_JOB),
)
"""Everything that the operator exports."""
