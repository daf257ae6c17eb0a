"""The dashboard *DPO fleet*: what runs, what waits, what restarts, and the state of the operator."""

from __future__ import annotations

from dpo_monitoring.panels import Annotation, Dashboard, Panel, Query, Row, Variable, clusters
from dpo_monitoring.queries import fleet, of_fleet, of_operator, own

WAITING = "Pending|Queued|Starting|Restarting"

_BAD_IF_TRUE = "TrainingStalled|SlowRank"
_CONDITIONS = fleet("dpo_job_condition", "namespace", "dpojob", "condition", more=f', condition%s"{_BAD_IF_TRUE}"')


def _jobs(title: str, description: str, states: str) -> Panel:
    """Return the number of jobs in some states."""
    inner = fleet("dpo_operator_jobs", "namespace", "state", more=f', state=~"{states}"')
    return Panel(title, description, "none", (Query(f"sum({inner})", title),), form="stat", width=4, height=4)


NOW = Row(
    "Now",
    (
        _jobs("Training", "DPOJobs that train now.", "Running|Checkpointing"),
        _jobs("Waiting", "DPOJobs that wait for their queue, for nodes, or for the next attempt.", WAITING),
        _jobs("Succeeded", "DPOJobs whose model is exported.", "Succeeded"),
        _jobs("Failed or rejected", "DPOJobs that need attention.", "Failed|Rejected"),
        Panel(
            "GPUs held",
            "GPUs of the attempts that run now.",
            "none",
            (Query(f"sum({fleet('dpo_operator_gpus', 'namespace')})", "GPUs"),),
            form="stat",
            width=4,
            height=4,
        ),
        Panel(
            "Operator",
            "1 while an operator is scraped, has filled its caches and has no dead watch. At 0, jobs continue but"
            " are not restarted.",
            "none",
            (
                Query(
                    f"{own('dpo_operator_synced')} * on (cluster) ({own('dpo_operator_watches_dead')} == bool 0)",
                    "ready",
                ),
            ),
            form="stat",
            width=4,
            height=4,
            lowest=0,
            highest=1,
            none="down",
        ),
        Panel(
            "Jobs",
            "Every DPOJob with its state and newest values. A name links to the dashboard DPO training.",
            "none",
            (
                Query(fleet("dpo_job_state", "namespace", "dpojob", "state"), "State"),
                Query(fleet("dpo_job_step", "namespace", "dpojob"), "Step"),
                Query(fleet("dpo_job_accuracy_ratio", "namespace", "dpojob"), "Accuracy"),
                Query(fleet("dpo_job_reward_margin", "namespace", "dpojob"), "Margin"),
                Query(fleet("dpo_job_loss", "namespace", "dpojob"), "Loss"),
                Query(fleet("dpo_job_attempt", "namespace", "dpojob"), "Attempt"),
                Query(fleet("dpo_job_queue_seconds", "namespace", "dpojob"), "Queue time"),
                Query(f"{fleet('dpo_job_gpu_seconds_total', 'namespace', 'dpojob')} / 3600", "GPU hours"),
            ),
            form="table",
            width=24,
            height=10,
            units={"Accuracy": "percentunit", "Queue time": "s", "GPU hours": "short"},
        ),
    ),
)

JOBS = Row(
    "Jobs",
    (
        Panel(
            "Jobs by state",
            "DPOJobs of the chosen namespaces by state, stacked.",
            "none",
            (
                Query(
                    f"sum by (state) ({fleet('dpo_operator_jobs', 'namespace', 'state')})",
                    "{{state}}",
                ),
            ),
            form="stacked",
            width=12,
            lowest=0,
        ),
        Panel(
            "Unfinished jobs by namespace",
            "DPOJobs that train or wait, by namespace.",
            "none",
            (
                Query(
                    "sum by (namespace) ("
                    + fleet("dpo_operator_jobs", "namespace", "state", more=', state!~"Succeeded|Failed|Rejected"')
                    + ")",
                    "{{namespace}}",
                ),
            ),
            form="stacked",
            width=12,
            lowest=0,
        ),
        Panel(
            "Failed attempts by class",
            "Attempts of all namespaces that ended in failure in the last hour. infrastructure: nodes were lost or"
            " drained; retryable: charged to maxRestarts; permanent: the job failed.",
            "none",
            (Query(f"sum by (class) (increase({of_operator('dpo_operator_restarts_total')}[1h]))", "{{class}}"),),
            form="stacked",
            lowest=0,
        ),
        Panel(
            "Failed attempts by cause",
            "The same attempts by the reason that ended them. Every reason and its remedy: docs/operations.md.",
            "none",
            (Query(f"sum by (reason) (increase({of_operator('dpo_operator_restarts_total')}[1h])) > 0", "{{reason}}"),),
            form="stacked",
            lowest=0,
        ),
        Panel(
            "Jobs with most attempts",
            "Number of the newest attempt; 1 is a job that never restarted.",
            "none",
            (Query(f"topk(10, {fleet('dpo_job_attempt', 'namespace', 'dpojob')})", "{{namespace}}/{{dpojob}}"),),
            lowest=0,
        ),
        Panel(
            "Queue time",
            "From the creation of an attempt until all its pods ran: its queue, the scheduler, images and volumes. Of"
            " each job's newest attempt; it grows while the job waits.",
            "s",
            (
                Query(
                    f"max by (namespace) ({fleet('dpo_job_queue_seconds', 'namespace', 'dpojob')})",
                    "{{namespace}} longest",
                ),
                Query(
                    f"quantile by (namespace) (0.5, {fleet('dpo_job_queue_seconds', 'namespace', 'dpojob')})",
                    "{{namespace}} median",
                ),
            ),
            lowest=0,
        ),
        Panel(
            "GPUs by namespace",
            "GPUs that running attempts hold, by namespace.",
            "none",
            (Query(fleet("dpo_operator_gpus", "namespace"), "{{namespace}}"),),
            form="stacked",
            lowest=0,
        ),
        Panel(
            "GPU hours",
            "GPUs times hours that attempts ran within the chosen time, by namespace; failed attempts count.",
            "short",
            (
                Query(
                    f"sum by (namespace) (increase({of_fleet('dpo_job_gpu_seconds_total')}[$__range])) / 3600",
                    "{{namespace}}",
                ),
            ),
            form="stat",
        ),
        Panel(
            "Runs that need a look",
            "Jobs with a condition that needs a look: the trainer does not answer, the first loss contradicts the"
            " reference, a loss is not finite, no learning after many steps, a stall, or a slow process.",
            "none",
            (
                Query(f"sum by (condition) ({_CONDITIONS % '!~'} == bool 0)", "{{condition}} is false"),
                Query(f"sum by (condition) ({_CONDITIONS % '=~'})", "{{condition}} is true"),
            ),
            lowest=0,
        ),
    ),
)

_PASSES = of_operator("dpo_operator_reconcile_duration_seconds_bucket")

OPERATOR = Row(
    "Operator",
    (
        Panel(
            "Duration of a reconcile",
            "How long the operator takes to reconcile one DPOJob, requests included: median and 99th percentile.",
            "s",
            tuple(
                Query(
                    f"histogram_quantile({share}, sum by (le) (rate({_PASSES}[$__rate_interval])))",
                    word,
                )
                for share, word in ((0.5, "median"), (0.99, "99th percentile"))
            ),
            lowest=0,
        ),
        Panel(
            "Failed reconciles",
            "Reconciles per second that failed and are retried, by cause: an HTTP status of the API server,"
            " unreachable, unsettled, or exception, which is a bug.",
            "none",
            (
                Query(
                    f"sum by (cause) (rate({of_operator('dpo_operator_reconcile_errors_total')}[$__rate_interval]))",
                    "{{cause}}",
                ),
            ),
            lowest=0,
        ),
        Panel(
            "Work queue",
            "DPOJobs waiting to be reconciled, and the longest wait. Both are normally near 0.",
            "short",
            (
                Query(own("dpo_operator_queue_depth"), "jobs waiting"),
                Query(own("dpo_operator_queue_oldest_seconds"), "longest wait in s"),
            ),
            lowest=0,
        ),
        Panel(
            "Watches",
            "Dead watches, and how often the watches were restarted. A dead watch makes /healthz fail.",
            "none",
            (
                Query(own("dpo_operator_watches_dead"), "dead"),
                Query(own("dpo_operator_watch_restarts"), "restarts"),
            ),
            lowest=0,
        ),
        Panel(
            "Since the watches were checked",
            "Time since the watches were last compared with the cluster, which happens every few minutes.",
            "s",
            (Query(f"time() - {own('dpo_operator_watch_checked_timestamp_seconds')}", "age"),),
            lowest=0,
        ),
        Panel(
            "Trainers that did not answer",
            "Requests for progress that failed. If there are many, a NetworkPolicy may block the trainers' port 9400.",
            "none",
            (Query(own("dpo_operator_scrape_failures"), "failures"),),
            lowest=0,
        ),
        Panel(
            "Operator's memory",
            "Resident memory of the operator's process.",
            "bytes",
            (Query(own("dpo_operator_process_resident_memory_bytes"), "memory"),),
            lowest=0,
        ),
        Panel(
            "Operator's CPU",
            "CPU cores that the operator uses.",
            "short",
            (Query(f"sum(rate({of_operator('dpo_operator_process_cpu_seconds_total')}[$__rate_interval]))", "cores"),),
            lowest=0,
        ),
        Panel(
            "PyTorchJob installed",
            "1 if the PyTorchJob definition is installed, which comes with training-operator.",
            "none",
            (Query(own("dpo_operator_backend_installed"), "PyTorchJob"),),
            lowest=0,
            highest=1,
        ),
    ),
)

FLEET = Dashboard(
    uid="dpo-fleet",
    title="DPO fleet",
    description="What runs, what waits, what restarts, and the state of the operator.",
    variables=(
        clusters("dpo_operator_info"),
        Variable(
            "namespace",
            "Namespace",
            "Namespaces of the jobs.",
            'label_values(dpo_operator_jobs{cluster=~"$cluster"}, namespace)',
        ),
    ),
    rows=(NOW, JOBS, OPERATOR),
    annotations=(
        Annotation(
            "New attempts",
            "Marks the start of each attempt after the first.",
            f"changes({of_fleet('dpo_job_attempt')}[2m]) > 0",
            "new attempt of {{dpojob}}",
            "red",
            shown=False,
        ),
    ),
    start="now-24h",
)
