"""Follows a job until it ends: `dpo submit --follow`, `dpo retry --follow`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console

from dpo_api.errors import Outcome
from dpo_api.progress import Progress
from dpo_api.status import DPOJobStatus, State, StatusProgress
from dpo_api.texts import counted
from dpo_cli.cluster.errors import ClusterError
from dpo_cli.cluster.kubectl import Job, Kubectl, suggestion
from dpo_cli.cluster.show import findings_of, model_step, remedy, result_of
from dpo_cli.console import STYLES, stderr, stdout
from dpo_cli.screen import LABEL_WIDTH, Screen, clean, open_screen
from dpo_operator.clock import to_moment

POLL_SECONDS = 2.0
"""The operator writes progress at most once a minute, and everything else at once."""
FAILED = 1
"""Exit code of a job whose reason has none of its own."""

_QUIET: tuple[State, ...] = ("Running", "Succeeded", "Failed", "Rejected")
"""States that are shown by other means than a line with their message."""


def exit_code(status: DPOJobStatus) -> int:
    """Return 0 for a job that succeeded; else the exit code of its reason, as the trainer has it, or 1."""
    if status.state == "Succeeded":
        return 0
    if status.state == "Rejected":
        return Outcome.InvalidSpec.exit_code
    reason = status.attempts[-1].reason if status.attempts else None
    outcome = next((each for each in Outcome if each.name == reason), Outcome.Internal)
    return outcome.exit_code or FAILED


def progress_of(said: StatusProgress, attempt: int) -> Progress:
    """Return a status's progress in the form in which the trainer reports it."""
    return Progress(
        phase=said.phase,
        step=said.step,
        total=said.total,
        epoch=said.epoch or 0.0,
        eta_seconds=said.eta_seconds,
        tokens_per_second=said.tokens_per_second,
        metrics=said.metrics,
        done=said.done,
        of=said.of,
        message=(said.message or "")[:1024],
        last_checkpoint_step=said.last_checkpoint_step,
        observed_at=0.0 if said.observed_at is None else to_moment(said.observed_at),
        attempt=attempt,
    )


@dataclass
class Story:
    """Turns successive versions of a job into lines and progress. No input or output here."""

    _state: tuple[str | None, str | None] = ("", None)
    _ended: set[int] = field(default_factory=set)
    _observed: str | None = None
    _found: set[str] = field(default_factory=set)

    def feed(self, job: Job) -> Iterator[str | Progress]:
        """Yield what is new: a line of text, or progress of the current attempt."""
        status = job.status
        yield from self._attempts(status)
        if status.state not in _QUIET and (status.state, status.message) != self._state:
            yield line(status.state or "Pending", status.message or "the operator has not processed the job yet.")
        self._state = (status.state, status.message)
        for text in findings_of(status):
            if status.state != "Rejected" and text.partition(":")[0] not in self._found:
                yield line("attention", text)
            self._found.add(text.partition(":")[0])
        said, attempt = status.progress, status.attempts[-1] if status.attempts else None
        if said is None or attempt is None or said.observed_at == self._observed:
            return
        self._observed = said.observed_at
        # Progress of an earlier attempt says nothing about this one.
        if attempt.running_time is not None and (said.observed_at or "") >= attempt.running_time:
            yield progress_of(said, attempt.number)

    def _attempts(self, status: DPOJobStatus) -> Iterator[str]:
        """Yield how attempts ended whose end no message of the state has reported; that of the newest one does."""
        for attempt in status.attempts:
            if attempt.result in (None, "Succeeded") or attempt.number in self._ended:
                continue
            self._ended.add(attempt.number)
            if attempt.number != status.attempt:
                yield line(f"attempt {attempt.number}", f"{attempt.reason}: {attempt.message or 'ended'}")


def line(label: str, text: str) -> str:
    """Return one line in the form of the rows of `dpo run`."""
    return f"  {label.lower():<{LABEL_WIDTH}} {clean(text)}"


def follow(
    kubectl: Kubectl, name: str, *, retried: str | None = None, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Show a job until it ends; return the exit code. Raises ClusterError, also if the job is deleted meanwhile.

    ``retried``: the value of a retry that the operator has to take up first.
    """
    console = stdout()
    job = kubectl.job(name)
    gpus = f" · {counted(job.gpus, 'GPU')}" if job.gpus else ""
    where = (job.spec.get("checkpoint") or {}).get("uri")
    console.print(f"{name}  {counted(job.nodes, 'node')}{gpus} · run directory {where}", style="bold")
    story = Story()
    try:
        with open_screen(console) as screen:
            while True:
                if retried in (None, job.status.retried) and (job.is_observed or not job.is_finished):
                    _show(screen, story, job)
                    if job.is_finished:
                        screen.close(time.time())
                        break
                sleep(POLL_SECONDS)
                job = _newer(kubectl, job, screen, sleep)
    except KeyboardInterrupt:
        console.print(f"  the job goes on: {suggestion(kubectl, 'status', name)}")
        raise
    conclude(console, job, kubectl)
    return exit_code(job.status)


def _show(screen: Screen, story: Story, job: Job) -> None:
    for new in story.feed(job):
        if isinstance(new, Progress):
            screen.show([new], time.time())
            continue
        if job.status.state != "Running":  # the phase that was shown is over
            screen.close(time.time())
        screen.say(new)
    screen.show([], time.time())


def _newer(kubectl: Kubectl, job: Job, screen: Screen, sleep: Callable[[float], None]) -> Job:
    """Read the job again, and wait for the API server if it does not answer. Raises ClusterError."""
    lost = False
    while True:
        try:
            return kubectl.job(job.name)
        except ClusterError as error:
            if error.is_final:
                raise
            if not lost:
                screen.say(line("waiting", f"the cluster does not answer: {error}"))
            lost = True
            sleep(POLL_SECONDS)


def conclude(console: Console, job: Job, kubectl: Kubectl) -> None:
    """Print how a job ended."""
    status = job.status
    if status.state == "Succeeded":
        model = f"{status.model_uri}{model_step(status)}" if status.model_uri else ""
        for label, text in (("result", result_of(status)), ("model", model), ("hub", status.hub_uri or "")):
            if text:
                console.print(f"{label:<11} {clean(text)}")
        return
    errors = stderr()
    errors.print("error", style=STYLES["error"], end="")
    errors.print(f"  {job.reference} is {status.state}: {clean(status.message or '')}")
    if status.state == "Failed":
        errors.print(f"{'':<7}{remedy(job)}")
        errors.print(f"{'':<7}the log: {suggestion(kubectl, 'logs', job.name)}")
        errors.print(f"{'':<7}again:   {suggestion(kubectl, 'retry', job.name)}")
