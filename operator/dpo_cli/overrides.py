"""`--set a.b[0].c=value`: sets fields of a manifest from the command line, before it is validated."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from dpo_api.errors import DPOError, UsageError
from dpo_api.findings import Finding, ManifestError, dotted, nearest, section_class
from dpo_api.manifest import Document, load_documents
from dpo_api.spec import DPOJobSpec

_PART = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)((?:\[\d+\])*)")

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Override:
    """One `--set`: a path in the manifest (`("spec", "data", "train", 0, "uri")`) and a value."""

    path: Path
    value: Any


def parse_override(text: str) -> Override:
    """Read `path=value`. The path starts at the spec; the value is YAML. Raises UsageError."""
    name, equals, raw = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: write path=value, such as --set training.maxSteps=10")
    path = _parse_path(name.strip(), text)
    check_path(path, text)
    try:
        documents = load_documents(f"value: {raw}\n")
    except DPOError as error:
        raise UsageError(f"--set {text}: the value is not YAML ({error}); quote it") from None
    return Override(path, documents[0].value["value"])


def _parse_path(name: str, text: str) -> Path:
    path: list[str | int] = []
    for part in name.split("."):
        match = _PART.fullmatch(part)
        if match is None:
            raise UsageError(f"--set {text}: {name!r} is not a path such as training.maxSteps or data.train[0].uri")
        path.append(match.group(1))
        path += [int(index) for index in re.findall(r"\d+", match.group(2))]
    return tuple(path) if path[0] == "spec" and len(path) > 1 else ("spec", *path)


def check_path(path: Path, text: str) -> None:
    """Raise UsageError, which suggests the nearest name, unless the API has this path."""
    annotation: Any = DPOJobSpec
    for position, part in enumerate(path[1:], 1):
        here = dotted(path[:position])
        if isinstance(part, int):
            if not _is_list(annotation):
                raise UsageError(f"--set {text}: {here} is not a list")
            annotation = _item(annotation)
            continue
        if _is_list(annotation):
            raise UsageError(f"--set {text}: {here} is a list; write {here}[0].{part} for its first item")
        section = section_class(annotation)
        if section is None:
            if _is_open(annotation):
                return
            raise UsageError(f"--set {text}: {here} is a single value and has no field {part}")
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        if part not in fields:
            raise UsageError(f"--set {text}: there is no {here}.{part}; {_nearest(part, list(fields), here)}")
        annotation = fields[part].annotation


def _nearest(name: str, known: Sequence[str], here: str) -> str:
    near = nearest(name, known)
    return f"did you mean {here}.{near}?" if near else f"{here} has {', '.join(known)}"


def _parts(annotation: Any) -> list[Any]:
    """The members of a union (without None), or the annotation itself; `Annotated` is unwrapped."""
    origin = get_origin(annotation)
    if origin in (tuple, list, dict) or not get_args(annotation):
        return [annotation]
    if hasattr(annotation, "__metadata__"):
        return _parts(get_args(annotation)[0])
    return [part for argument in get_args(annotation) if argument is not type(None) for part in _parts(argument)]


def _is_list(annotation: Any) -> bool:
    return any(get_origin(part) in (tuple, list) for part in _parts(annotation))


def _is_open(annotation: Any) -> bool:
    return any(get_origin(part) is dict or part is Any for part in _parts(annotation))


def _item(annotation: Any) -> Any:
    return next(get_args(part)[0] for part in _parts(annotation) if get_origin(part) in (tuple, list))


def apply(document: Document, overrides: Sequence[Override]) -> Document:
    """Return a copy of the document with the values set.

    An index may name an existing item or the position after the last one. Raises UsageError for one beyond that.
    """
    value = copy.deepcopy(document.value)
    for override in overrides:
        _put(value, override)
    return replace(document, value=value)


def _put(document: Any, override: Override) -> None:
    path = override.path
    node = document
    for position, part in enumerate(path):
        last = position == len(path) - 1
        fresh: Any = override.value if last else ([] if isinstance(path[position + 1], int) else {})
        if isinstance(part, int):
            if not isinstance(node, list) or part > len(node):
                held = len(node) if isinstance(node, list) else 0
                raise UsageError(f"--set {dotted(path)}: {dotted(path[:position])} has {held} items, counted from 0")
            if part == len(node):
                node.append(fresh)
            elif last or node[part] is None:
                node[part] = fresh
        else:
            if not isinstance(node, dict):
                raise UsageError(f"--set {dotted(path)}: {dotted(path[:position]) or 'the manifest'} is not a section")
            if last or node.get(part) is None:
                node[part] = fresh
        node = node[part]


def blame(error: ManifestError, overrides: Sequence[Override]) -> ManifestError:
    """Return the error with `--set`, not the file, as the source of the findings that it caused."""

    def attribute(finding: Finding) -> Finding:
        caused = any(
            finding.field == dotted(override.path)
            or finding.field.startswith((f"{dotted(override.path)}.", f"{dotted(override.path)}["))
            for override in overrides
        )
        return replace(finding, source="--set", line=None) if caused else finding

    return ManifestError(attribute(finding) for finding in error.findings)
