"""From a file and the command line to one validated DPOJob."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_api.errors import UsageError
from dpo_api.findings import Finding, ManifestError
from dpo_api.manifest import Document, DPOJob, dpo_documents, load_documents, parse_job
from dpo_cli.overrides import Override, apply, blame, parse_override


@dataclass(frozen=True)
class LoadedJob:
    """A valid job, and the document with line numbers that it was read from."""

    job: DPOJob
    document: Document


def name_of(document: Document) -> str:
    """Return a document's metadata.name, valid or not; empty if there is none."""
    metadata = document.value.get("metadata") if isinstance(document.value, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) else ""


def read_documents(file: str, settings: Sequence[str]) -> tuple[list[Document], list[Override]]:
    """Return a file's DPOJobs, not validated yet, and the parsed `--set` values.

    Raises ManifestError, NotFoundError for the file and UsageError for the settings.
    """
    overrides = [parse_override(text) for text in settings]
    return [apply(document, overrides) for document in dpo_documents(load_documents(file))], overrides


def parse(document: Document, overrides: Sequence[Override]) -> LoadedJob:
    """Validate one document. Raises ManifestError with all findings."""
    try:
        return LoadedJob(parse_job(document), document)
    except ManifestError as error:
        raise blame(error, overrides) from None


def load_one(file: str, settings: Sequence[str], name: str | None) -> LoadedJob:
    """Return the file's only DPOJob, or the named one. Raises UsageError unless exactly one matches."""
    documents, overrides = read_documents(file, settings)
    names = [name_of(document) for document in documents]
    if name is None and len(documents) > 1:
        raise UsageError(f"{file} holds {len(documents)} DPOJobs ({', '.join(names)}); choose one with --name")
    chosen = [document for document, own in zip(documents, names, strict=True) if name is None or own == name]
    if not chosen:
        raise UsageError(f"{file} holds no DPOJob named {name}; it holds {', '.join(names)}")
    if len(chosen) > 1:
        raise ManifestError([Finding("error", "metadata.name", f"{name} is the name of {len(chosen)} DPOJobs", file)])
    return parse(chosen[0], overrides)
