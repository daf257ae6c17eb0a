"""The text of `dpo status` and `dpo top`, from stored DPOJobs alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from dpo_api.metrics import Group, newest_group
from dpo_api.progress import PHASE_TEXTS
from dpo_api.status import Attempt, ConditionType, DPOJobStatus, StatusProgress
from dpo_api.texts import age, clock, counted, figure
from dpo_cli.cluster.kubectl import Job, Kubectl, suggestion, table
from dpo_cli.rows import scores
from dpo_cli.screen import clean
from dpo_operator.clock import to_moment
from dpo_operator.events import INVARIANTS
from dpo_operator.reasons import Reason, named

ATTEMPTS_SHOWN = 10
NODES_SHOWN = 2

MATTER = (*INVARIANTS, (ConditionType.Accepted, "False"))
"""Conditions that say more than the job's state does, with the status that needs attention."""

Row = tuple[str, str]


def steps_per_second(job: Job) -> float | None:
    """Return the speed of a running job: the steps that are left, divided by the trainer's own estimate."""
    progress = job.status.progress
    if job.status.state != "Running" or progress is None or not progress.eta_seconds:
        return None
    left = progress.total - progress.step
    return left / progress.eta_seconds if left > 0 else None


def speed(value: float | None) -> str:
    """Write steps per second; empty if unknown."""
    return "" if value is None else figure(value)


def eta(job: Job) -> str:
    """Write the time left of a running job; empty if unknown."""
    progress = job.status.progress
    running = job.status.state == "Running" and progress is not None and progress.eta_seconds
    return clock(progress.eta_seconds or 0) if running and progress is not None else ""


def rows_of(job: Job) -> Iterator[Row]:
    """Yield label and text of each line about a job, but for attempts and conditions."""
    status = job.status
    yield "state", f"{status.state or 'Pending'}: {status.message or 'the operator has not processed the job yet.'}"
    if not job.is_observed:
        yield "note", "the operator has not processed the newest change of the spec yet"
    yield "size", _size(job)
    if status.queue:
        yield "queue", status.queue
    if status.progress is not None:
        yield from _progress(job, status.progress)
    if status.restarts:
        limit = (job.spec.get("runPolicy") or {}).get("maxRestarts", 3)
        yield "restarts", f"{status.restarts:,}; {status.charged_restarts or 0} of {limit} count against maxRestarts"
    if status.run_directory:
        yield "run", status.run_directory
    if status.model_uri:
        yield "model", status.model_uri + model_step(status)
    if status.hub_uri:
        yield "hub", status.hub_uri


def _size(job: Job) -> str:
    gpus = job.gpus // job.nodes
    return counted(job.nodes, "node") + (f" with {counted(gpus, 'GPU')}" if gpus else ", CPU")


def _progress(job: Job, progress: StatusProgress) -> Iterator[Row]:
    parts = [f"{progress.step:,}/{progress.total:,}"] if progress.total else []
    if job.status.state == "Running":
        parts += [] if progress.phase == "train" else [PHASE_TEXTS[progress.phase]]
        rate = steps_per_second(job)
        parts += [f"{speed(rate)} steps/s"] if rate is not None else []
        parts += [f"{progress.tokens_per_second:,.0f} tok/s"] if progress.tokens_per_second else []
        parts += [f"ETA {eta(job)}"] if eta(job) else []
    if parts:
        yield "step", "  ".join(parts)
    groups: tuple[tuple[str, Group], ...] = (("train", "train"), ("validation", "val"))
    for label, group in groups:
        found = scores(progress.metrics, group)
        if found:
            yield label, "  ".join(found)
    if progress.last_checkpoint_step:
        yield "checkpoint", f"step {progress.last_checkpoint_step:,}"
    if progress.best is not None:
        yield "best", f"{progress.best.metric} {figure(progress.best.value)} at step {progress.best.step:,}"


def model_step(status: DPOJobStatus) -> str:
    """Write the step whose weights the model has, if it is not the last one."""
    last = None if status.progress is None else status.progress.step
    return "" if status.model_step in (None, last) else f" (of step {status.model_step:,})"


def attempts_of(attempts: Sequence[Attempt]) -> list[str]:
    """Return the lines of the table of attempts: the newest ones, the last one last."""
    rows = [
        (
            str(attempt.number),
            attempt.result or "",
            attempt.reason or "",
            _nodes(attempt),
            "" if attempt.from_step is None else f"{attempt.from_step:,}",
            "" if attempt.last_step is None else f"{attempt.last_step:,}",
            attempt.start_time or "",
            attempt.end_time or "",
        )
        for attempt in attempts[-ATTEMPTS_SHOWN:]
    ]
    return table(("ATTEMPT", "RESULT", "REASON", "NODES", "FROM", "STEP", "START", "END"), rows)


def _nodes(attempt: Attempt) -> str:
    names = sorted({pod.node for pod in attempt.pods if pod.node})
    more = len(names) - NODES_SHOWN
    return ",".join(names[:NODES_SHOWN]) + (f",+{more}" if more > 0 else "")


def findings_of(status: DPOJobStatus) -> list[str]:
    """Return one line for each condition that needs attention."""
    bad = {(kind.value, truth) for kind, truth in MATTER}
    return [f"{c.type}={c.status}  {c.reason}: {c.message}" for c in status.conditions if (c.type, c.status) in bad]


def next_step(job: Job, kubectl: Kubectl) -> str:
    """Return what to do next: a command, after the cause's remedy if the job has failed."""
    status, name = job.status, job.name
    match status.state:
        case "Rejected":
            text = f"correct the manifest, then: {suggestion(kubectl, 'submit', 'FILE')}"
        case "Suspended":
            text = suggestion(kubectl, "resume", name)
        case "Queued":
            text = shlex.join(["kubectl", "get", "workloads", *kubectl.options])
        case "Succeeded":
            text = f"dpo report {status.run_directory}" if status.run_directory else ""
        case "Failed":
            text = f"{remedy(job)} Then: {suggestion(kubectl, 'retry', name)}"
        case None | "Pending":
            text = suggestion(kubectl, "status", name)
        case _:
            text = suggestion(kubectl, "logs", name, "-f")
    return text


def remedy(job: Job) -> str:
    """Return what to do about a job that failed."""
    ended = next((c for c in job.status.conditions if c.type == ConditionType.Failed.value), None)
    return named(ended.reason if ended is not None else None, Reason.Failed).remedy


def status_lines(job: Job, kubectl: Kubectl) -> list[str]:
    """Return the screen of `dpo status`."""
    lines = [job.name if kubectl.namespace is None else f"{job.namespace}/{job.name}"]
    lines += [f"  {label:<11} {clean(text)}" for label, text in rows_of(job)]
    lines += [f"  {'attention':<11} {clean(text)}" for text in findings_of(job.status)]
    following = next_step(job, kubectl)
    if following:
        lines.append(f"  {'next':<11} {following}")
    if job.status.attempts:
        lines += ["", *(f"  {line}" for line in attempts_of(job.status.attempts))]
    return lines


def top_lines(jobs: Sequence[Job], now: float, *, everywhere: bool) -> list[str]:
    """Return the table of `dpo top`: running jobs first, then by name. ``now``: Unix seconds."""
    order = sorted(jobs, key=lambda job: (job.is_finished, job.status.state != "Running", job.namespace, job.name))
    head = ["NAME", "STATE", "STEP", "STEP/S", "ACC", "MARGIN", "GPUS", "ETA", "AGE"]
    return table(
        ["NAMESPACE", *head] if everywhere else head,
        [([job.namespace] if everywhere else []) + _top(job, now) for job in order],
    )


def _top(job: Job, now: float) -> list[str]:
    summary = job.status.summary
    created = job.raw["metadata"].get("creationTimestamp")
    return [
        job.name,
        job.status.state or "Pending",
        summary.step or "",
        speed(steps_per_second(job)),
        summary.accuracy or "",
        summary.margin or "",
        str(job.gpus),
        eta(job),
        age(now - to_moment(created)) if created else "",
    ]


def result_of(status: DPOJobStatus) -> str:
    """Describe the last metrics of a job that ended; empty if it has none."""
    group = newest_group(status.final_metrics)
    found = scores(status.final_metrics, group)
    name = "validation" if group == "val" else "training"
    return f"{name}: {'  '.join(found)}" if found else ""
