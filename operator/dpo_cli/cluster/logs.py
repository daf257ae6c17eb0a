"""`dpo logs`: the log of one rank of an attempt, by default of rank 0 of the newest one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dpo_api.errors import UsageError
from dpo_api.spec import Resources
from dpo_cli.cluster.errors import ClusterError, failure
from dpo_cli.cluster.kubectl import Job, Kubectl
from dpo_cli.console import stderr
from dpo_operator import names
from dpo_operator.backend.pod import CONTAINER
from dpo_operator.backend.pytorchjob import expected_pods

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class LogOptions:
    """The command line of `dpo logs`."""

    rank: int = 0
    attempt: int | None = None
    follow: bool = False
    tail: int | None = None


def logs(kubectl: Kubectl, name: str, options: LogOptions, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Print the log of the pod that runs a rank; return the exit code. Raises ClusterError and UsageError.

    With ``follow`` and no attempt given, wait for the first attempt to start, and go on with later ones until the job
    ends.
    """
    job = kubectl.job(name)
    node = node_of(job, options.rank)
    if options.attempt is not None:
        _require(job, options.attempt)
        return _print(kubectl, job, options.attempt, node, options)
    if not options.follow:
        if not job.status.attempt:
            raise ClusterError(f"error: {job.reference} has no attempt yet: {job.status.message or 'it is Pending'}")
        return _print(kubectl, job, job.status.attempt, node, options)
    shown, code = max(0, (job.status.attempt or 0) - 1), 0
    while True:
        newest = job.status.attempt or 0
        # A newest attempt that has not started yet is waited for; of earlier ones there is no more to come.
        ready = newest if _has_started(job) else newest - 1
        while shown < ready:
            shown += 1
            if shown > 1:
                stderr().print(f"attempt {shown}:")
            code = _print(kubectl, job, shown, node, options)
        if job.is_finished and shown >= newest:
            return code
        sleep(POLL_SECONDS)
        job = kubectl.job(name)


def node_of(job: Job, rank: int) -> int:
    """Return the node, from 0, that runs a rank of all processes. Raises UsageError for a rank that the job lacks."""
    resources = job.spec.get("resources") or {}
    each = processes(resources)
    count = job.nodes * each
    if rank >= count:
        raise UsageError(f"--rank {rank}: {job.name} has the ranks 0 to {count - 1} ({job.nodes} x {each})")
    return rank // each


def processes(resources: Mapping[str, Any]) -> int:
    """Return the processes of each node, by the rule of the spec."""
    known = {key: resources[key] for key in ("nodes", "gpusPerNode", "processesPerNode") if key in resources}
    try:
        return Resources.model_validate(known).processes()
    except ValidationError:  # of a newer version
        return 1


def _has_started(job: Job) -> bool:
    """Whether all pods of the newest attempt have run, so that there is a log, or none will come."""
    attempt = job.status.attempts[-1] if job.status.attempts else None
    return attempt is not None and (attempt.running_time is not None or attempt.end_time is not None)


def _require(job: Job, attempt: int) -> None:
    newest = job.status.attempt or 0
    if not 1 <= attempt <= newest:
        has = f"the attempts 1 to {newest}" if newest > 1 else "attempt 1 alone" if newest else "no attempt yet"
        raise ClusterError(f"error: --attempt {attempt}: {job.reference} has {has}")


def _print(kubectl: Kubectl, job: Job, attempt: int, node: int, options: LogOptions) -> int:
    """Print one pod's log; return kubectl's exit code, after its error and what it means."""
    pod = expected_pods(names.child(job.name, attempt), job.nodes)[node]
    words = ["logs", pod, "-c", CONTAINER]
    words += ["-f"] if options.follow else []
    words += [] if options.tail is None else [f"--tail={options.tail}"]
    sys.stdout.flush()
    done = kubectl.stream(*words)
    if done.returncode == 0:
        sys.stderr.write(done.stderr)
        return 0
    error = failure(done.stderr, done.returncode)
    sys.stderr.write(f"{error}\n")
    if "(NotFound)" in str(error):
        stderr().print(
            f"The pods of attempt {attempt} are gone. Those of failed attempts are kept up to"
            " runPolicy.attemptsHistoryLimit; an attempt that the operator ended, such as a suspended one, leaves none."
        )
    return error.exit_code
