"""`dpo run`: runs a DPOJob on this machine, from the same manifest as on a cluster."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from dpo_api.errors import DPOError, NotFoundError, Outcome, UsageError
from dpo_api.findings import Finding
from dpo_api.manifest import DPOJob
from dpo_api.progress import LastWords, Progress
from dpo_api.sizing import Hardware, hardware_named
from dpo_api.spec import DPOJobSpec, Resources, Section
from dpo_api.texts import counted
from dpo_cli import machine, trainer
from dpo_cli.console import headline, print_error, print_findings, stderr, stdout
from dpo_cli.events import EventTail
from dpo_cli.jobs import LoadedJob, load_one
from dpo_cli.joining import Member, member
from dpo_cli.layouts import layout_rows
from dpo_cli.report import SUMMARY, Written, read_spec, write_report
from dpo_cli.screen import Screen, clean, open_screen
from dpo_cli.stores import Stores
from dpo_cli.summary import ending
from dpo_cli.validate import Options, Verdict, judge_job
from dpo_store import Store, join_uri, local_path_of
from dpo_store.access import CA_BUNDLE
from dpo_store.errors import from_os_error
from dpo_store.revisions import at_commits, repositories, saved

LOG = "trainer.log"
LOG_TAIL_LINES = 20

CLUSTER_ONLY = (
    "image",
    "imagePullPolicy",
    "serviceAccountName",
    "resources.nodes",
    "resources.gpusPerNode",
    "resources.gpuResource",
    "resources.gpuProduct",
    "resources.cpu",
    "resources.memory",
    "resources.shm",
    "resources.scratch",
    "resources.extended",
    "storage.credentialsSecretRef",
    "storage.hub.tokenSecretRef",
    "storage.cache",
    "storage.caBundle.configMapRef",
    "storage.caBundle.secretRef",
    "runPolicy",
    "logging.wandb.apiKeySecretRef",
    "logging.mlflow.tokenSecretRef",
    "podTemplate",
)
"""Settings that apply to clusters only."""


@dataclass(frozen=True)
class RunOptions:
    """The command line of `dpo run`."""

    file: str
    output: str | None = None
    settings: tuple[str, ...] = ()
    processes: int | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    name: str | None = None


def run(options: RunOptions) -> int:
    """Check the job, train, show progress and print a summary; return the exit code.

    Raises DPOError for errors before the training starts.
    """
    place = member(os.environ)
    if place is not None and options.processes is not None:
        raise UsageError(
            f"--processes {options.processes}: {place.starter} has started {place.size} processes, and each is one of"
            f" the run; remove --processes, or start one `dpo run` without {place.starter}"
        )
    loaded = load_one(options.file, options.settings, options.name)
    job = loaded.job
    trainer.require_trainer()
    if place is not None and not place.is_main:
        options = replace(options, port=None)  # rank 0 serves
    if options.port is not None:
        machine.check_port(options.host, options.port)
    gpus, product = machine.gpus()
    if place is None:
        processes, notes = choose_processes(options.processes, job.spec.resources, gpus)
        nodes = (1, processes)
    else:
        processes, notes, nodes = place.size, [], place.nodes(gpus)
    hardware = hardware_named(*nodes, product) if gpus else None
    ignored = ignored_here(job.spec)
    if ignored:
        notes.append(f"ignored: applies to clusters only: {', '.join(ignored)}")
    main = place is None or place.is_main
    verdict = _preflight(options, loaded, nodes, notes, hardware, quiet=not main)
    if not verdict.valid:
        return verdict.outcome.exit_code
    run_dir = options.output or job.spec.checkpoint.uri or _run_dir(job)
    shown = {str(finding) for finding in verdict.findings}
    return _Run(job, run_dir, processes, options, shown, place, gpus).go()


def _run_dir(job: DPOJob) -> str:
    return f"runs/{job.metadata.name}"


def ignored_here(spec: DPOJobSpec) -> list[str]:
    """Return the cluster-only settings that the user has set, in the order of the table."""
    return [path for path in CLUSTER_ONLY if _is_set(spec, path.split("."))]


def _is_set(section: object, path: Sequence[str]) -> bool:
    if not isinstance(section, Section):
        return False
    for attribute, field in type(section).model_fields.items():
        if (field.alias or attribute) == path[0]:
            if attribute not in section.model_fields_set:
                return False
            return len(path) == 1 or _is_set(getattr(section, attribute), path[1:])
    raise AssertionError(f"the API has no field {path[0]}")


def environment_of(spec: DPOJobSpec) -> dict[str, str]:
    """Return environment variables for the settings that a pod gets from its volumes."""
    bundle = spec.storage.ca_bundle
    return {} if bundle is None or bundle.path is None else {CA_BUNDLE: bundle.path}


def choose_processes(asked: int | None, resources: Resources, gpus: int) -> tuple[int, list[str]]:
    """Return how many processes to start on this machine, and notes for the user.

    The command line takes precedence. Otherwise it is one per GPU, or fewer if the spec says so; on CPU the spec's
    number, or one.
    """
    if asked is not None:
        return asked, []
    chosen, stated, wanted = resources.processes(gpus), resources.processes_per_node, resources.gpus_per_node
    if gpus == 0 and wanted:
        return chosen, [f"no GPU found on this machine (the manifest asks for {wanted} per node): training on CPU"]
    if stated is not None and stated > chosen:
        return chosen, [
            f"resources.processesPerNode is {stated}, but this machine has {gpus} GPUs: starting {chosen} processes"
        ]
    return chosen, []


def _preflight(
    options: RunOptions,
    loaded: LoadedJob,
    nodes: tuple[int, int],
    notes: Sequence[str],
    hardware: Hardware | None,
    *,
    quiet: bool,
) -> Verdict:
    """Check everything that the job refers to, and print the findings unless another process does.

    nodes: their number, and that of processes on each.
    """
    here = Resources(nodes=nodes[0], processes_per_node=nodes[1])
    spec = loaded.job.spec.model_copy(update={"resources": here})
    if options.output is not None:  # checked like checkpoint.uri
        spec = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"uri": options.output})})
    if repositories(spec):  # a later attempt reads what the first one read
        run_dir = spec.checkpoint.uri or _run_dir(loaded.job)
        store = Stores(spec).reach(spec.checkpoint.storage)
        spec = at_commits(spec, saved(store, run_dir))
    job = loaded.job.model_copy(update={"spec": spec})
    verdict = judge_job(options.file, loaded.document, job, Options(here=True, hardware=hardware))
    if options.output is not None:
        verdict = replace(verdict, findings=tuple(_blame_output(finding) for finding in verdict.findings))
    if quiet:
        return verdict
    console = stdout() if verdict.valid else stderr()
    if not verdict.valid:
        console.print(f"{options.file}: {headline(verdict.findings)}", style="bold")
    print_findings(console, [f for f in verdict.findings if not verdict.valid or f.level == "warning"])
    for note in notes:
        console.print(f"  note     {note}")
    for label, text in [] if verdict.choice is None else layout_rows(verdict.choice):
        console.print(f"  {label:<11} {text}")
    return verdict


def _blame_output(finding: Finding) -> Finding:
    if finding.field != "spec.checkpoint.uri":
        return finding
    return replace(finding, field="--output", line=None)


class _Run:
    """One run of the trainer, from its temporary files to the summary."""

    def __init__(
        self,
        job: DPOJob,
        run_dir: str,
        processes: int,
        options: RunOptions,
        shown: set[str],
        place: Member | None,
        gpus: int,
    ) -> None:
        """``shown``: findings that were printed already; the trainer may report the same ones.

        ``place``: of this process among others that joined it; ``gpus``: how many are visible here.
        """
        self._place = place
        self._variables = {} if place is None else place.environment(gpus)
        self._is_main = place is None or place.is_main
        self._job = job
        self._run_dir = run_dir
        self._processes = processes
        self._options = options
        self._console = stdout()
        self._store: Store = Stores(job.spec).reach(job.spec.checkpoint.storage)
        self._checkpoint_step: int | None = None
        self._trained = False
        self._shown = shown

    def go(self) -> int:
        """Train and print the summary; return the exit code."""
        spec = self._job.spec
        scratch = Path(tempfile.mkdtemp(prefix=f"dpo-{self._job.metadata.name}-"))
        keep_scratch = False
        try:
            launch = trainer.Launch(
                spec=scratch / "spec.json",
                run_dir=self._run_dir,
                events=scratch / "events.jsonl",
                last_words=scratch / "last-words.json",
                processes=self._processes,
                grace_seconds=spec.checkpoint.grace_period_seconds,
                port=self._options.port,
                host=self._options.host,
                joined=self._place is not None,
            )
            launch.spec.write_text(self._job.to_json(), encoding="utf-8")
            log_path = self._log_path(scratch)
            with self._open_log(log_path) as log:
                start = log.tell()
                code, words = self._train(launch, log)
            keep_scratch = words.known_outcome is Outcome.Internal and log_path.parent == scratch
            self._sum_up(words)
            if words.known_outcome is Outcome.Internal and code != trainer.KILLED_EXIT_CODE:
                self._show_log(log_path, start)
            return code
        finally:
            if not keep_scratch:
                shutil.rmtree(scratch, ignore_errors=True)

    def _log_path(self, scratch: Path) -> Path:
        folder = local_path_of(self._run_dir)
        name = LOG if self._is_main or self._place is None else f"trainer-{self._place.rank}.log"
        return (scratch if folder is None else folder) / name

    def _open_log(self, path: Path) -> BinaryIO:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab")
        except FileExistsError:
            raise NotFoundError(f"{path.parent}: is a file, not a folder; choose another run directory") from None
        except OSError as error:
            raise from_os_error(error, str(path)) from None

    def _train(self, launch: trainer.Launch, log: BinaryIO) -> tuple[int, LastWords]:
        """Start the trainer and show its progress until it ends; return the exit code and the termination message."""
        job = self._job
        self._print_start()
        tail = EventTail(launch.events)
        requests = trainer.Requests()
        with ExitStack() as stack:
            stack.enter_context(requests.listen())
            child = trainer.start(launch.command(), log, {**self._variables, **environment_of(job.spec)})
            screen: Screen = stack.enter_context(open_screen(self._console))

            # Python and torch take seconds to load; until then the trainer reports nothing.
            screen.show([Progress(phase="starting", observed_at=time.time())] if self._is_main else [], time.time())

            def look() -> None:
                events = tail.read()
                for event in events:
                    self._checkpoint_step = event.last_checkpoint_step or self._checkpoint_step
                    self._trained = self._trained or event.phase == "train"
                    for warning in event.warnings:
                        if warning not in self._shown:
                            self._shown.add(warning)
                            screen.say(f"  warning    {clean(warning)}")
                screen.show(events, time.time())

            def stopping() -> None:
                screen.say("stopping: writing a checkpoint first; press Ctrl-C again to stop at once without one")

            try:
                killed = trainer.wait(child, requests, look=look, stopping=stopping, sleep=time.sleep)
            except BaseException:
                # The screen failed (`dpo run … | head`), not the training: let it write a checkpoint.
                child.terminate()
                child.wait()
                raise
            look()
            screen.close(time.time())
        if killed:
            message = "killed by a second Ctrl-C"
            return trainer.KILLED_EXIT_CODE, LastWords(outcome=Outcome.Internal.name, message=message)
        words = trainer.last_words(launch.last_words, child.returncode)
        return words.known_outcome.exit_code, words

    def _print_start(self) -> None:
        started = counted(self._processes, "process", "processes")
        started += "" if self._place is None else f" of {self._place.starter}"
        if self._is_main:
            self._console.print(f"{self._job.metadata.name}  {started} · run directory {self._run_dir}", style="bold")

    def _sum_up(self, words: LastWords) -> None:
        """Write summary.json and report.html into the run directory, and print how the run ended."""
        if not self._is_main:
            if words.known_outcome not in (Outcome.Succeeded, Outcome.Stopped):
                print_error(stderr(), words.known_outcome, words.message)
            return
        written: Written | None = None
        try:
            spec = read_spec(self._store, self._run_dir)
            # A run that was refused does not own the directory: what another run wrote there is kept.
            if spec is not None and spec.get("spec") == json.loads(self._job.to_json())["spec"]:
                summary = json.dumps(json.loads(words.to_json()), indent=1) + "\n"
                self._store.write(join_uri(self._run_dir, SUMMARY), summary.encode())
                if words.step or words.known_outcome is Outcome.Succeeded:
                    written = write_report(self._store, self._run_dir, spec, words)
        except DPOError as error:
            self._console.print(f"  note     no report was written: {clean(str(error))}")
        if words.known_outcome not in (Outcome.Succeeded, Outcome.Stopped):
            print_error(stderr(), words.known_outcome, words.message)
        if words.known_outcome is Outcome.Succeeded and not self._trained:
            did = "there was nothing to do" if words.hub_uri is None else "nothing was trained"
            self._console.print(f"  note     this run was already finished: {did}")
        lines = ending(words, written, self._run_dir, self._checkpoint_step, shlex.join(["dpo", *sys.argv[1:]]))
        for label, text in lines:
            self._console.print(f"{label:<11} {clean(text)}")

    def _show_log(self, path: Path, start: int) -> None:
        """Print the last lines that this run added to the log."""
        console: Console = stderr()
        for line in tail_of(path, start, LOG_TAIL_LINES):
            console.print(f"  | {line}", style="dim")
        console.print(f"full log: {path}")


def tail_of(path: Path, start: int, count: int) -> Iterator[str]:
    """Yield the last `count` lines of a log, only of what was written after byte `start`."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(start, end - 64 * 1024))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return
    yield from (clean(line) for line in text.splitlines()[-count:])
