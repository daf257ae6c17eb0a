"""Reads DPOJob manifests: YAML as kubectl reads it, and JSON as the API server and our own files store it.

Numbers are parsed as in Go's YAML (9e-7, 1_000), dates are text, and a key may not appear twice. All errors are
reported at once, each with its field and line.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from dpo_api.errors import NotFoundError
from dpo_api.fields import NAME_PATTERN, STORED, AnnotationValue, DnsLabel, LabelKey, LabelValue, Rule, Section, Text
from dpo_api.findings import Finding, ManifestError, findings_of
from dpo_api.findings import Path as FieldPath
from dpo_api.spec import DPOJobSpec

GROUP = "dpo-operator.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "DPOJob"

MAX_BYTES = 1 << 20  # the API server's limit is 1.5 MiB, including what it adds itself

MAX_DEPTH = 64
MAX_VALUES = 100_000

NAME_MAX = 45
"""Names of PyTorchJobs and pods add a suffix for attempt, replica and index, and may have at most 63 characters."""

# Other fields of ObjectMeta, which we ignore. `kubectl get -o yaml` prints them.
_OTHER_METADATA = frozenset(
    {
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generateName",
        "managedFields",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
    }
)


class Metadata(Section):
    """The part of a Kubernetes object's metadata that we read."""

    name: Text = Field(
        pattern=NAME_PATTERN,
        min_length=1,
        max_length=NAME_MAX,
        description="Name of the job: lower-case letters, digits and -, starting with a letter, at most 45.",
    )
    namespace: DnsLabel | None = Field(default=None, description="Namespace of the job.")
    labels: dict[LabelKey, LabelValue] = Field(default={}, description="Labels.")
    annotations: dict[LabelKey, AnnotationValue] = Field(default={}, description="Annotations.")
    uid: Text | None = Field(default=None, description="Unique id, assigned by the API server.")
    generation: int | None = Field(default=None, description="Version of the spec, counted by the API server.")

    @model_validator(mode="before")
    @classmethod
    def _ignore_other_metadata(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key not in _OTHER_METADATA}
        return data


class DPOJob(Section):
    """A job that aligns a model with preference data by Direct Preference Optimization."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    api_version: Literal["dpo-operator.dev/v1alpha1"] = Field(description="Version of the API.")
    kind: Literal["DPOJob"] = Field(description="Kind of the object.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.")
    spec: DPOJobSpec = Field(description="What to train, on what, how and where.")

    @model_validator(mode="before")
    @classmethod
    def _ignore_status(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key != "status"}
        return data

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON values. Fields that were not set are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the manifest as JSON text, which ``load_manifest`` reads back to an equal object."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Document:
    """One YAML document before validation."""

    value: Any
    """Mappings, lists and scalars, as in JSON."""
    source: str
    """File name for messages."""
    lines: Mapping[FieldPath, int] = field(default_factory=dict)
    """Line of each path, from 1."""


def load_manifests(source: Path | str, *, stored: bool = False) -> list[DPOJob]:
    """Read every DPOJob in a file or a text; other kinds are skipped.

    ``source`` is a path, ``-`` for standard input, or, when it spans lines or starts with ``{``, the text itself.
    ``stored``: as in ``parse_job``. Raises ManifestError with all findings, and NotFoundError if there is no such file.
    """
    jobs: list[DPOJob] = []
    findings: list[Finding] = []
    for document in dpo_documents(load_documents(source)):
        try:
            jobs.append(parse_job(document, stored=stored))
        except ManifestError as error:
            findings += error.findings
    if findings:
        raise ManifestError(findings)
    return jobs


def load_manifest(source: Path | str, *, stored: bool = False) -> DPOJob:
    """Like ``load_manifests``, for exactly one DPOJob. Raises ManifestError if there are more."""
    jobs = load_manifests(source, stored=stored)
    if len(jobs) != 1:
        names = ", ".join(job.metadata.name for job in jobs)
        raise ManifestError([Finding("error", "", f"holds {len(jobs)} DPOJobs ({names}) where one is expected")])
    return jobs[0]


def parse_job(document: Document | Mapping[str, Any], *, stored: bool = False) -> DPOJob:
    """Validate one document. Raises ManifestError with all findings.

    ``stored``: an earlier version may have accepted it, so fields that were removed since are dropped if they changed
    nothing. In a manifest they are errors.
    """
    if not isinstance(document, Document):
        document = Document(document, "")
    try:
        return DPOJob.model_validate(document.value, by_alias=True, by_name=False, context=STORED if stored else None)
    except ValidationError as error:
        found = findings_of(error, DPOJob, source=document.source, lines=document.lines)
        raise ManifestError(found) from None


def dpo_documents(documents: list[Document]) -> list[Document]:
    """Return the documents that are DPOJobs, including items of a ``List``. Raises ManifestError if there are none."""
    ours: list[Document] = []
    others: list[str] = []
    source = documents[0].source if documents else ""
    for document in documents:
        value = document.value
        if not isinstance(value, dict):
            raise ManifestError(
                [Finding("error", "", "is not a mapping of apiVersion, kind, metadata and spec", document.source)]
            )
        kind, version = value.get("kind"), str(value.get("apiVersion", ""))
        if kind == "List" and isinstance(value.get("items"), list):
            ours += [_item(document, index) for index in range(len(value["items"]))]
        elif kind == KIND or version.startswith(GROUP) or kind is None:
            ours.append(document)
        else:
            others.append(str(kind))
    if not ours:
        seen = f" (it holds {', '.join(others)})" if others else " (it is empty)"
        raise ManifestError([Finding("error", "", f"holds no object of kind {KIND}{seen}", source)])
    return ours


def _item(document: Document, index: int) -> Document:
    prefix: FieldPath = ("items", index)
    lines = {path[2:]: line for path, line in document.lines.items() if path[:2] == prefix}
    return Document(document.value["items"][index], document.source, lines)


def load_documents(source: Path | str) -> list[Document]:
    """Read the documents of a file, of standard input (``-``) or of a text, without validation."""
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return _documents(source, "")
    if str(source) == "-":
        return _documents(sys.stdin.read(), "<stdin>")
    path = Path(source)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ManifestError([Finding("error", "", "is larger than 1 MiB, so it is not a manifest", str(source))])
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{source}: no such file") from None
    except IsADirectoryError:
        raise NotFoundError(f"{source}: is a folder; name a manifest file") from None
    except UnicodeDecodeError:
        raise ManifestError([Finding("error", "", "is not UTF-8 text", str(source))]) from None
    except PermissionError:
        raise NotFoundError(f"{source}: permission denied") from None
    return _documents(text, str(source))


def _documents(text: str, source: str) -> list[Document]:
    documents: list[Document] = []
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                continue
            lines: dict[FieldPath, int] = {}
            value = _value(node, loader, (), lines)
            if value is not None:
                documents.append(Document(value, source, lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ManifestError(
            [Finding("error", "", f"YAML: {problem}", source, mark.line + 1 if mark else None)]
        ) from None
    except yaml.YAMLError as error:
        raise ManifestError([Finding("error", "", f"YAML: {error}".replace("\n", " "), source)]) from None
    finally:
        if loader is not None:
            loader.dispose()
    return documents


_INT = re.compile(r"^[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")


_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with scalars parsed as in Go's YAML."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] in {"bool", "null", "merge"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _value(node: yaml.Node, loader: _Loader, path: FieldPath, lines: dict[FieldPath, int]) -> Any:
    """Build JSON values from a node and record the line of every path. Raises yaml.MarkedYAMLError."""
    if len(path) > MAX_DEPTH or len(lines) > MAX_VALUES:  # an alias to itself, or aliases of aliases
        raise yaml.MarkedYAMLError(problem="nests or repeats aliases too often", problem_mark=node.start_mark)
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise yaml.MarkedYAMLError(problem=f"the tag {tag} is not allowed in a manifest", problem_mark=node.start_mark)
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, loader, path, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, loader, (*path, index), lines) for index, child in enumerate(node.value)]
    kind = node.tag.rpartition(":")[2]
    if kind == "int":
        return _int(node.value)
    if kind == "float":
        number = float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))
        if not math.isfinite(number):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is not a finite number", problem_mark=node.start_mark)
        return number
    return loader.construct_object(node)


def _mapping(node: yaml.MappingNode, loader: _Loader, path: FieldPath, lines: dict[FieldPath, int]) -> dict[str, Any]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = _key(key_node)
        if key in seen:
            problem = f'the key "{key}" appears twice; the first is on line {seen[key]}'
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        seen[key] = key_node.start_mark.line + 1
    # Merged keys come first, so that the mapping's own keys override them.
    loader.flatten_mapping(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _key(key_node)
        values[key] = _value(value_node, loader, (*path, key), lines)
        lines[(*path, key)] = key_node.start_mark.line + 1
    return values


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=node.start_mark)
    return str(node.value)


def _int(text: str) -> int:
    digits = text.replace("_", "").lower()
    sign, digits = (-1, digits[1:]) if digits[0] == "-" else (1, digits.lstrip("+"))
    if digits.startswith("0") and digits.isdigit():  # 0644 is octal in Go's YAML
        return sign * int(digits, 8)
    return sign * int(digits, 0)
