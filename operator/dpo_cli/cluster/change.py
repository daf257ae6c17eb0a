"""Commands that change a job on the cluster: suspend, resume, retry, delete."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from dpo_cli.cluster.errors import ClusterError
from dpo_cli.cluster.follow import follow
from dpo_cli.cluster.kubectl import RESOURCE, Job, Kubectl
from dpo_cli.console import stdout
from dpo_operator.labels import RETRY


def set_suspend(kubectl: Kubectl, names: Sequence[str], *, suspend: bool) -> None:
    """Set runPolicy.suspend of jobs that have not ended. Raises ClusterError."""
    done = "suspended" if suspend else "resumed"
    for name in names:
        job = kubectl.job(name)
        if job.is_finished:
            verb = "suspend" if suspend else "resume"
            raise ClusterError(f"error: {job.reference} has ended ({job.status.state}): there is nothing to {verb}")
        now = bool((job.spec.get("runPolicy") or {}).get("suspend"))
        if now is suspend:
            print(f"{job.reference} {done} (no change)")
            continue
        kubectl.patch(name, {"spec": {"runPolicy": {"suspend": suspend}}})
        print(f"{job.reference} {done}")


def retry(kubectl: Kubectl, name: str, *, follow_it: bool = False) -> int:
    """Start a failed job again from its newest checkpoint; return the exit code. Raises ClusterError."""
    job = kubectl.job(name)
    if job.status.state != "Failed":
        raise ClusterError(f"error: {job.reference} is {job.status.state or 'Pending'}: {_why_not(job)}")
    value = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    kubectl.patch(name, {"metadata": {"annotations": {RETRY: value}}})
    step = job.status.progress.last_checkpoint_step if job.status.progress is not None else None
    place = f"step {step}" if step else "the newest checkpoint, if there is one"
    stdout().print(f"{job.reference} retried: attempt {(job.status.attempt or 0) + 1} continues from {place}")
    sys.stdout.flush()
    return follow(kubectl, name, retried=value) if follow_it else 0


def _why_not(job: Job) -> str:
    match job.status.state:
        case "Succeeded":
            return "only a job that failed is retried; to train again, create a job with another checkpoint.uri"
        case "Rejected":
            return "only a job that failed is retried; correct the manifest and submit it again"
        case "Suspended":
            return "only a job that failed is retried; to continue it, resume it"
        case _:
            return "only a job that failed is retried, and this one has not ended"


def delete(kubectl: Kubectl, names: Sequence[str]) -> None:
    """Delete jobs with their attempts. The run directories stay. Raises ClusterError."""
    done = kubectl.run("delete", RESOURCE, *names)
    sys.stdout.write(done)
