"""`dpo submit`: checks a manifest and applies its DPOJobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_api.errors import UsageError
from dpo_api.manifest import KIND, Document, load_documents
from dpo_api.sizing import hardware_of
from dpo_cli.cluster.errors import failure
from dpo_cli.cluster.follow import follow
from dpo_cli.cluster.kubectl import MANAGER, Kubectl, suggestion
from dpo_cli.console import headline, print_findings, stderr, stdout
from dpo_cli.jobs import read_documents
from dpo_cli.layouts import layout_rows
from dpo_cli.validate import Options, Verdict, judge


@dataclass(frozen=True)
class SubmitOptions:
    """The command line of `dpo submit`."""

    files: tuple[str, ...]
    settings: tuple[str, ...] = ()
    follow: bool = False
    force_conflicts: bool = False
    dry_run: bool = False


def submit(kubectl: Kubectl, options: SubmitOptions) -> int:
    """Apply every DPOJob of the files, unless one has an error; return the exit code.

    Raises DPOError for files that cannot be read, and ClusterError.
    """
    documents = _checked(options)
    if isinstance(documents, int):
        return documents
    if options.follow and len(documents) > 1:
        names = ", ".join(str(document.value["metadata"]["name"]) for document in documents)
        raise UsageError(f"--follow follows one job, but there are {len(documents)}: {names}")
    _apply(kubectl, documents, options)
    if options.dry_run:
        return 0
    for document in documents:
        metadata = document.value["metadata"]
        there = kubectl.within(metadata.get("namespace"))
        if options.follow:
            return follow(there, str(metadata["name"]))
        _note(there, str(metadata["name"]))
    return 0


def _checked(options: SubmitOptions) -> list[Document] | int:
    """Return the DPOJobs of all files, or the exit code if one of them has an error, after printing all findings.

    Data is not looked at, and the model's config.json only if it can be read from here: often only the cluster can
    reach them.
    """
    documents: list[Document] = []
    verdicts: list[Verdict] = []
    for file in options.files:
        found, overrides = read_documents(file, options.settings)
        documents += found
        judged = [
            judge(file, document, overrides, Options(offline=True, cluster=True, peek=True)) for document in found
        ]
        verdicts += judged
        for verdict in judged:
            if not verdict.valid:
                stderr().print(f"{file}: {headline(verdict.findings)}", style="bold")
            print_findings(stderr(), [f for f in verdict.findings if not verdict.valid or f.level == "warning"])
            _show_layout(verdict)
    wrong = next((verdict for verdict in verdicts if not verdict.valid), None)
    if wrong is not None:
        return wrong.outcome.exit_code
    for file in options.files:
        if file != "-":
            _name_others(file)
    return documents


def _show_layout(verdict: Verdict) -> None:
    """Print the layout that a job will run in, or that it cannot be predicted here."""
    if verdict.choice is not None:
        for label, text in layout_rows(verdict.choice):
            stderr().print(f"  {label:<11} {text}")
    elif verdict.valid and verdict.seen.facts is None and verdict.job is not None and hardware_of(verdict.job.spec):
        stderr().print("  note     the model cannot be read from here: the layout is chosen when the pods start")


def _name_others(file: str) -> None:
    """Print a note that names the objects of other kinds, which only kubectl applies."""
    values = [document.value for document in load_documents(file) if isinstance(document.value, dict)]
    others = [
        f"{value.get('kind')} {(value.get('metadata') or {}).get('name')}"
        for value in values
        if value.get("kind") not in (KIND, "List", None)
    ]
    if others:
        stderr().print(f"  note     not applied, since dpo submits DPOJobs alone: {', '.join(others)} (kubectl apply)")


def _apply(kubectl: Kubectl, documents: Sequence[Document], options: SubmitOptions) -> None:
    """Apply the documents on the server. What was applied is printed even if another one is refused."""
    body = json.dumps({"apiVersion": "v1", "kind": "List", "items": [document.value for document in documents]})
    words = ["apply", "--server-side", f"--field-manager={MANAGER}"]
    words += ["--force-conflicts"] if options.force_conflicts else []
    words += ["--dry-run=server"] if options.dry_run else []
    done = kubectl.attempt(*words, "-f", "-", stdin=body)
    sys.stdout.write(done.stdout)
    sys.stdout.flush()
    if done.returncode != 0:
        raise failure(done.stderr, done.returncode)
    sys.stderr.write(done.stderr)


def _note(kubectl: Kubectl, name: str) -> None:
    """Print what comes next, or that nothing does because the job has ended before."""
    job = kubectl.job(name)
    if job.is_finished and job.status.state != "Rejected":
        again = suggestion(kubectl, "retry" if job.status.state == "Failed" else "delete", name)
        stdout().print(f"  note     {name} has ended before ({job.status.state}); to run it again: {again}")
    else:
        stdout().print(f"  next     {suggestion(kubectl, 'status', name)}")
