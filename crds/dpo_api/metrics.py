"""The table of all metrics: names in Prometheus and in metrics.jsonl, meaning, unit, type and labels.

Rank 0 of the trainer exports METRICS and the operator exports OPERATOR, both built from these rows. Dashboards, alerts,
reports and docs/metrics.md use the same rows; a name that is not in the table is an error. On a cluster every series of
a run also has the labels RUN_LABELS. Prometheus names use base units and ratios from 0 to 1; a step is a value, never a
label. Rewards are beta times the policy's log-prob minus the reference's, summed over the response; those of the loss
simpo, which has no reference, are beta times the policy's mean log-prob of a token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
Unit = Literal["", "seconds", "bytes", "ratio", "Unix time", "nats", "tokens/s"]
"""Nats: natural logarithms of probabilities. Empty: a count, or a number without a unit."""

Group = Literal["train", "val"]

LOSS, ACCURACY, MARGIN = "loss", "acc", "rewards_margin"
"""Keys that people look at first, without their group."""

Monitored = Literal["val/loss", "val/preference_loss", "val/acc", "val/rewards_margin"]
"""Validation metrics that a run can choose its best checkpoint by, or stop early by."""

LOWER_IS_BETTER: dict[Monitored, bool] = {
    "val/loss": True,
    "val/preference_loss": True,
    "val/acc": False,
    "val/rewards_margin": False,
}

MEMORY_PEAK, MEMORY_PREDICTED = "train/memory_peak", "train/memory_predicted"
"""Keys of rank 0's GPU memory."""

SLOWEST_RANK, SLOWEST_RATIO = "train/slowest_rank", "train/slowest_rank_ratio"
"""Keys of the rank that took longest."""


@dataclass(frozen=True)
class Metric:
    """One series."""

    name: str
    """Name in Prometheus; counters end in ``_total``."""
    kind: Kind
    help: str
    """One sentence: the meaning."""
    unit: Unit = ""
    key: str | None = None
    """Key in metrics.jsonl and in Progress.metrics; None if the metric is not there."""
    labels: tuple[str, ...] = ()
    """Label names with few values; every series also has the labels of the scrape."""
    no_panel: str = ""
    """Why no panel shows it; empty if one does."""
    on_gpus: bool = False
    """Whether only a run on GPUs has it."""
    of_several: bool = False
    """Whether only a run whose processes do the same work beside each other has it."""

    @property
    def family(self) -> str:
        """The name for prometheus_client, which adds ``_total`` to a counter."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name


_BETWEEN = "halfway between chosen and rejected, which have panels"
_DETAIL = "for a closer look at the operator's process"

_SHARED: tuple[tuple[str, str, str, Unit, str], ...] = (
    ("loss", LOSS, "Loss that is minimised, per pair (SFT alone: per token), mean over the {batch}.", "nats", ""),
    ("preference_loss", "preference_loss", "Preference loss before its weight, mean over the {batch}.", "nats", ""),
    (
        "sft_loss",
        "sft_loss",
        "Negative log-prob of the chosen response before its weight, mean over the {batch}; absent at weight 0.",
        "nats",
        "",
    ),
    (
        "reward_accuracy_ratio",
        ACCURACY,
        "Share of pairs whose chosen reward is greater than the rejected one, over the {batch}.",
        "ratio",
        "",
    ),
    ("reward_chosen", "rewards_chosen_mean", "Mean reward of the chosen responses over the {batch}.", "nats", ""),
    ("reward_rejected", "rewards_rejected_mean", "Mean reward of the rejected responses over the {batch}.", "nats", ""),
    ("reward_margin", MARGIN, "Mean chosen reward minus mean rejected reward over the {batch}.", "nats", ""),
    ("reward_mean", "rewards_all_mean", "Mean reward of all responses over the {batch}.", "nats", _BETWEEN),
    (
        "reward_stddev",
        "rewards_all_std",
        "Standard deviation of the rewards of all responses over the {batch}.",
        "nats",
        "",
    ),
)


def _shared(group: Group, batch: str) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"dpo_{group}_{name}", "gauge", text.format(batch=batch), unit, key=f"{group}/{key}", no_panel=no_panel)
        for name, key, text, unit, no_panel in _SHARED
    )


TRAIN: tuple[Metric, ...] = (
    *_shared("train", "step's global batch"),
    Metric("dpo_train_grad_norm", "gauge", "Norm of the whole gradient before clipping.", key="train/grad_norm"),
    Metric("dpo_train_learning_rate", "gauge", "Learning rate of the last step.", key="train/lr"),
    Metric("dpo_train_step_duration_seconds", "gauge", "Duration of the last step.", "seconds", key="train/step_time"),
    Metric(
        "dpo_train_tokens_per_second",
        "gauge",
        "Tokens computed per second in the last step by all processes.",
        "tokens/s",
        key="train/tokens_per_second",
    ),
    Metric(
        "dpo_train_mfu_ratio",
        "gauge",
        "Model FLOPs utilization: FLOPs that the last step needed, each counted once, divided by what the GPUs' peak"
        " allows in its time; absent on CPU, in fp32 and on unknown GPUs.",
        "ratio",
        key="train/mfu",
        on_gpus=True,
    ),
    Metric(
        "dpo_train_slowest_rank",
        "gauge",
        "Process, from 0, that took longest for its own part of the step before, waits left out; absent where no two"
        " processes do the same work.",
        key=SLOWEST_RANK,
        no_panel="a name and not a height: read it where its ratio is high",
        of_several=True,
    ),
    Metric(
        "dpo_train_slowest_rank_ratio",
        "gauge",
        "Time of that process for an amount of work, divided by the median of the processes of its pipeline stage.",
        "ratio",
        key=SLOWEST_RATIO,
        of_several=True,
    ),
    Metric("dpo_train_epoch", "gauge", "Epochs done, with a fraction.", key="train/epoch"),
    Metric(
        "dpo_train_steps_total", "counter", "Optimizer steps done in this run, earlier attempts included.", key="step"
    ),
    Metric(
        "dpo_train_samples_total",
        "counter",
        "Pairs trained on, repetitions counted.",
        key="train/consumed_samples",
    ),
    Metric("dpo_train_tokens_total", "counter", "Tokens computed in training by this attempt, all processes."),
    Metric("dpo_train_planned_steps", "gauge", "Optimizer steps planned for the run."),
    Metric(
        "dpo_train_gpu_memory_peak_bytes",
        "gauge",
        "Most memory that tensors of rank 0 have taken of its GPU in this attempt; absent on CPU.",
        "bytes",
        key=MEMORY_PEAK,
        on_gpus=True,
    ),
    Metric(
        "dpo_train_gpu_memory_predicted_bytes",
        "gauge",
        "What was predicted for it when the layout was chosen; absent on CPU.",
        "bytes",
        key=MEMORY_PREDICTED,
        on_gpus=True,
    ),
    Metric("dpo_train_last_step_timestamp_seconds", "gauge", "Time of the last optimizer step.", "Unix time"),
)
"""Training, one value per step."""

VAL: tuple[Metric, ...] = (
    *_shared("val", "validation pairs"),
    Metric(
        "dpo_val_step_duration_seconds",
        "gauge",
        "Duration of the last validation.",
        "seconds",
        key="val/validation_step_time",
    ),
    Metric("dpo_val_last_run_timestamp_seconds", "gauge", "Time at which the last validation ended.", "Unix time"),
)
"""Validation, one value each time."""

RUN: tuple[Metric, ...] = (
    Metric("dpo_data_wait_seconds_total", "counter", "Time that steps waited for data.", "seconds"),
    Metric("dpo_data_pairs", "gauge", "Usable training pairs."),
    Metric("dpo_data_dropped_pairs", "gauge", "Training records left out, by reason.", labels=("reason",)),
    Metric(
        "dpo_checkpoint_last_success_timestamp_seconds", "gauge", "Time of the newest complete checkpoint.", "Unix time"
    ),
    Metric("dpo_checkpoint_last_step", "gauge", "Step of the newest complete checkpoint."),
    Metric(
        "dpo_checkpoint_best_value",
        "gauge",
        "Best value so far of the validation metric that checkpoint.monitor names (label metric): NaN before there is"
        " one, absent without checkpoint.monitor.",
        labels=("metric",),
    ),
    Metric(
        "dpo_checkpoint_best_step",
        "gauge",
        "Step of that value: NaN before there is one, absent without checkpoint.monitor.",
    ),
    Metric("dpo_checkpoint_wait_seconds_total", "counter", "Time that training waited for checkpoints.", "seconds"),
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
"""Labels that identify a run's series; the chart's PodMonitor takes them from the pod. What the operator exports about
one DPOJob has the first two.
"""

_JOB = ("namespace", "dpojob")

OPERATOR: tuple[Metric, ...] = (
    Metric(
        "dpo_operator_info",
        "gauge",
        "Always 1; its labels describe the operator.",
        labels=("version",),
        no_panel="only its presence matters, which an alert checks",
    ),
    Metric("dpo_operator_jobs", "gauge", "DPOJobs by namespace and state.", labels=("namespace", "state")),
    Metric("dpo_operator_gpus", "gauge", "GPUs held by running attempts.", labels=("namespace",)),
    Metric(
        "dpo_operator_restarts_total",
        "counter",
        "Attempts that failed, by class (infrastructure, retryable or permanent) and reason.",
        labels=("class", "reason"),
    ),
    Metric(
        "dpo_operator_reconcile_duration_seconds",
        "histogram",
        "Duration of one reconcile of a DPOJob.",
        "seconds",
    ),
    Metric(
        "dpo_operator_reconcile_errors_total",
        "counter",
        "Reconciles that failed and are retried, by cause: an HTTP status, unreachable, unsettled, or exception"
        " (a bug).",
        labels=("cause",),
    ),
    Metric("dpo_operator_queue_depth", "gauge", "DPOJobs waiting to be reconciled."),
    Metric("dpo_operator_queue_oldest_seconds", "gauge", "Longest wait of a DPOJob in the queue.", "seconds"),
    Metric("dpo_operator_watches_dead", "gauge", "Kinds whose watch is dead."),
    Metric("dpo_operator_watch_restarts", "gauge", "Times that the watches were restarted."),
    Metric(
        "dpo_operator_watch_checked_timestamp_seconds",
        "gauge",
        "Time at which the watches were last compared with the cluster.",
        "Unix time",
    ),
    Metric("dpo_operator_synced", "gauge", "1 once the caches are filled."),
    Metric("dpo_operator_backend_installed", "gauge", "1 if the PyTorchJob definition is installed."),
    Metric("dpo_operator_scrape_failures", "gauge", "Requests to trainers that were not answered."),
    Metric("dpo_operator_process_resident_memory_bytes", "gauge", "Resident memory of the operator.", "bytes"),
    Metric(
        "dpo_operator_process_virtual_memory_bytes",
        "gauge",
        "Virtual memory of the operator.",
        "bytes",
        no_panel=_DETAIL,
    ),
    Metric("dpo_operator_process_open_fds", "gauge", "File descriptors that the operator has open.", no_panel=_DETAIL),
    Metric("dpo_operator_process_max_fds", "gauge", "File descriptors that the operator may open.", no_panel=_DETAIL),
    Metric("dpo_operator_process_cpu_seconds_total", "counter", "CPU time of the operator.", "seconds"),
    Metric(
        "dpo_operator_process_start_time_seconds",
        "gauge",
        "Time at which the operator started.",
        "Unix time",
        no_panel=_DETAIL,
    ),
    Metric("dpo_job_state", "gauge", "Always 1; the label holds the DPOJob's state.", labels=(*_JOB, "state")),
    Metric(
        "dpo_job_condition",
        "gauge",
        "1 while a condition about the run is True, 0 while it is False: ProgressAvailable, LayoutVerified,"
        " ReferenceConsistent, Finite, Learning, TrainingStalled, SlowRank.",
        labels=(*_JOB, "condition"),
    ),
    Metric("dpo_job_attempt", "gauge", "Number of the current or last attempt.", labels=_JOB),
    Metric(
        "dpo_job_queue_seconds",
        "gauge",
        "Time from the creation of the newest attempt until all its pods ran; it grows until they do.",
        "seconds",
        labels=_JOB,
    ),
    Metric(
        "dpo_job_gpu_seconds_total",
        "counter",
        "GPUs times seconds of all attempts, from the status: a restart of the operator does not reset it.",
        "seconds",
        labels=_JOB,
    ),
    Metric("dpo_job_step", "gauge", "Optimizer steps done.", labels=_JOB),
    Metric(
        "dpo_job_accuracy_ratio",
        "gauge",
        "Newest accuracy: of validation once there is one, else of training.",
        "ratio",
        labels=_JOB,
    ),
    Metric("dpo_job_reward_margin", "gauge", "Newest reward margin, from the same place.", "nats", labels=_JOB),
    Metric("dpo_job_loss", "gauge", "Newest loss, from the same place.", "nats", labels=_JOB),
)
"""Everything that the operator exports."""

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in (*METRICS, *OPERATOR)}
"""Every row by its name in Prometheus."""


def newest_group(keys: Collection[str]) -> Group:
    """Return where a run's accuracy, margin and loss are taken from: validation once it has them, else training.

    ``keys``: the metrics that the run has reported so far. A validation before the first step reports no accuracy, and
    SFT alone never does: then the loss decides.
    """
    groups: tuple[Group, ...] = ("val", "train")
    for key in (ACCURACY, LOSS):
        for group in groups:
            if f"{group}/{key}" in keys:
                return group
    return "train"
