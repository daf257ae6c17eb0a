"""`dpo validate`: reports all errors of a manifest at once, or the effective settings of a valid one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_api.errors import DPOError, Outcome
from dpo_api.findings import Finding, ManifestError, placed
from dpo_api.manifest import Document, DPOJob
from dpo_api.models import ModelFacts
from dpo_api.plan import Plan, make_plan
from dpo_api.sizing import Choice, Hardware, checkpoint_bytes, choose, hardware_of, with_layout
from dpo_api.spec import DPOJobSpec
from dpo_api.texts import quantity, size
from dpo_api.validation import check
from dpo_cli import trainer
from dpo_cli.console import headline, print_findings
from dpo_cli.effective import rows
from dpo_cli.jobs import name_of, parse, read_documents
from dpo_cli.layouts import ASSUMPTION, json_of, layout_rows
from dpo_cli.overrides import Override
from dpo_cli.survey import Problem, Survey, survey, survey_model


@dataclass(frozen=True)
class Options:
    """What to check. `offline`: only the manifest. `cluster`: also what only a cluster needs."""

    deep: bool = False
    offline: bool = False
    cluster: bool = False
    here: bool = False
    """Whether the job will run on this machine."""
    peek: bool = False
    """With `offline`: read the model's config.json if it can be reached at once, for the choice of a layout."""
    hardware: Hardware | None = None
    """The GPUs of this machine; None: those that the manifest asks for."""


@dataclass(frozen=True)
class Verdict:
    """The result of validating one job."""

    file: str
    name: str
    findings: tuple[Finding, ...]
    outcome: Outcome
    """The outcome of a run that cannot start; Succeeded if it can."""
    job: DPOJob | None = None
    seen: Survey = field(default_factory=Survey)
    plan: Plan | None = None
    exact: bool = False
    """Whether the plan's pairs were counted by the index pass, not estimated."""
    counts: Mapping[str, Any] | None = None
    """What the index pass printed."""
    choice: Choice | None = None
    """The layout on GPUs; None on CPU, and if the model was not read."""

    @property
    def runs(self) -> DPOJobSpec | None:
        """The spec with the sizes that were chosen and the settings of the adapter that it continues."""
        if self.job is None:
            return None
        spec = self.seen.settled(self.job.spec)
        return spec if self.choice is None else with_layout(spec, self.choice.best.layout)

    @property
    def valid(self) -> bool:
        """Whether a run can start."""
        return self.outcome is Outcome.Succeeded


def validate_file(file: str, settings: Sequence[str], options: Options) -> list[Verdict]:
    """Return a verdict for each DPOJob of a file, or one for a file that cannot be read. Raises UsageError."""
    try:
        documents, overrides = read_documents(file, settings)
    except ManifestError as error:
        return [Verdict(file, "", error.findings, error.outcome)]
    return [judge(file, document, overrides, options) for document in documents]


def judge(file: str, document: Document, overrides: Sequence[Override], options: Options) -> Verdict:
    """Validate one document, check what it refers to and derive its plan."""
    try:
        job = parse(document, overrides).job
    except ManifestError as error:
        return Verdict(file, name_of(document), error.findings, error.outcome)
    return judge_job(file, document, job, options)


def judge_job(file: str, document: Document, job: DPOJob, options: Options) -> Verdict:
    """Check everything that a valid job refers to and derive its plan."""
    spec = job.spec
    seen = survey(spec, here=options.here) if not options.offline else survey_model(spec) if options.peek else Survey()
    spec = seen.settled(spec)
    problems = list(seen.problems)
    pairs, exact, counts = seen.estimated_pairs, False, None
    validation: list[int] | None = None
    if options.deep and not any(problem.finding.level == "error" for problem in problems):
        result = _index(job)
        if result.counts is None:
            problems.append(Problem(Finding("error", "spec.data", result.message), result.outcome))
        else:
            counts, exact = result.counts, True
            pairs, validation = pairs_of(result.counts)
            warnings = [
                text for data in (counts["train"], *counts["validation"].values()) for text in data.get("warnings", ())
            ]
            problems += [Problem(Finding("warning", "spec.data", text), Outcome.Succeeded) for text in warnings]
    if pairs == 0:
        empty = Finding("error", "spec.data.train", "no usable pair is left, so there is nothing to train on")
        problems.append(Problem(empty, Outcome.InvalidData))
        pairs = None
    found = check(spec, seen.facts, pairs, validation_pairs=validation, on_cluster=options.cluster)
    choice = None
    if seen.facts is not None and not any(finding.level == "error" for finding in found):
        choice, unfit = _choose(spec, seen.facts, options.hardware or hardware_of(spec))
        found += unfit
    lines = placed([*(problem.finding for problem in problems), *found], document.source, document.lines)
    outcome = _outcome(problems, found)
    plan = None
    if pairs and outcome is Outcome.Succeeded:
        estimated = [source.lines or 0 for source in seen.validation]
        runs = spec if choice is None else with_layout(spec, choice.best.layout)
        plan = make_plan(runs, pairs, estimated if validation is None else validation)
    return Verdict(file, job.metadata.name, tuple(lines), outcome, job, seen, plan, exact, counts, choice)


def _choose(spec: DPOJobSpec, facts: ModelFacts, hardware: Hardware | None) -> tuple[Choice | None, list[Finding]]:
    """Return the layout, or why none fits: an error, or a warning if the GPU's product is only assumed."""
    if hardware is None:
        return None, []
    found = choose(facts, spec, hardware)
    if isinstance(found, Choice):
        return found, list(host_memory(spec, facts, found))
    if hardware.known:
        return None, [Finding("error", found.field, found.message)]
    return None, [Finding("warning", found.field, f"{found.message} ({ASSUMPTION})")]


def host_memory(spec: DPOJobSpec, facts: ModelFacts, choice: Choice) -> Iterator[Finding]:
    """Check that a pod's memory holds the copies of an asynchronous checkpoint, one for each process."""
    if not spec.checkpoint.async_save or spec.resources.memory is None:
        return
    need = choice.hardware.gpus * checkpoint_bytes(facts, spec, choice.best.layout)
    if need > quantity(spec.resources.memory):
        text = f"{spec.resources.memory} is less than an asynchronous checkpoint copies to a pod's memory, {size(need)}"
        yield Finding("error", "spec.resources.memory", f"{text}; raise it, or set checkpoint.async to false")


def _outcome(problems: Sequence[Problem], found: Sequence[Finding]) -> Outcome:
    """Errors in the manifest itself come first: the user can fix them by editing it."""
    if any(finding.level == "error" for finding in found):
        return Outcome.InvalidSpec
    return next((problem.outcome for problem in problems if problem.finding.level == "error"), Outcome.Succeeded)


def _index(job: DPOJob) -> trainer.IndexResult:
    trainer.require_trainer()
    with tempfile.TemporaryDirectory(prefix="dpo-validate-") as folder:
        spec = Path(folder) / "spec.json"
        spec.write_text(job.to_json(), encoding="utf-8")
        return trainer.index(spec)


def pairs_of(counts: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Return the usable training pairs and those of each validation source from what the index pass printed."""
    return int(counts["train"]["pairs"]), [int(source["pairs"]) for source in counts["validation"].values()]


def print_text(console: Console, verdict: Verdict) -> None:
    """Print a verdict as text: findings, then the effective settings of a valid job."""
    title = f"{verdict.file}: {headline(verdict.findings)}"
    console.print(title, style="bold")
    print_findings(console, verdict.findings)
    if verdict.job is None or not verdict.valid:
        return
    layout = [] if verdict.choice is None else layout_rows(verdict.choice)
    effective = rows(verdict.job, verdict.seen, verdict.plan, exact=verdict.exact, counts=verdict.counts)
    for label, text in [*effective, *layout]:
        console.print(f"  {label:<11} {text}")


def as_json(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as a JSON array, one object per job."""
    return json.dumps([_json_of(verdict) for verdict in verdicts], indent=2, ensure_ascii=False, allow_nan=False)


def _json_of(verdict: Verdict) -> dict[str, Any]:
    spec = verdict.runs
    plan = None
    if verdict.plan is not None:
        derived = asdict(replace(verdict.plan, warnings=()))
        del derived["warnings"]
        plan = {"exact": verdict.exact, **{_camel(key): value for key, value in derived.items()}}
    return {
        "file": verdict.file,
        "name": verdict.name,
        "valid": verdict.valid,
        "outcome": verdict.outcome.name,
        "findings": [
            {key: value for key, value in asdict(finding).items() if value not in (None, "")}
            for finding in verdict.findings
        ],
        "model": None if verdict.seen.facts is None else {_camel(k): v for k, v in asdict(verdict.seen.facts).items()},
        "data": {
            kind: [
                {"estimated_lines" if k == "lines" else k: v for k, v in asdict(source).items()} for source in sources
            ]
            for kind, sources in (("train", verdict.seen.train), ("validation", verdict.seen.validation))
        },
        "plan": plan,
        "layout": None if verdict.choice is None else json_of(verdict.choice),
        "index": verdict.counts,
        "effective": None if spec is None else spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


def worst(verdicts: Sequence[Verdict]) -> Outcome:
    """Return the first outcome that is not Succeeded."""
    return next((verdict.outcome for verdict in verdicts if not verdict.valid), Outcome.Succeeded)


def problem_of(file: str, error: DPOError) -> Verdict:
    """Return the verdict on a file that could not be checked."""
    return Verdict(file, "", (Finding("error", "", str(error)),), error.outcome)
