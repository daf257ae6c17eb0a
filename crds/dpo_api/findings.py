"""Errors, warnings and notes about a manifest: each is one sentence, and all are reported at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dpo_api.errors import InvalidSpecError
from dpo_api.fields import PATTERN_HINTS, Section

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One error, warning or note about one field."""

    level: Level
    """error: the job cannot run. warning: it runs, but probably not as intended. note: worth knowing."""
    field: str
    """Path in camelCase, such as ``spec.data.train[0].uri``; empty for the manifest as a whole."""
    message: str
    """What is wrong, with the value, and how to fix it."""
    source: str = ""
    """File (or file and job) of the finding; empty when there is only one."""
    line: int | None = None
    """Line of the field in the file, counted from 1, if known."""

    def __str__(self) -> str:
        """Return ``field: message``."""
        return f"{self.field}: {self.message}" if self.field else self.message


class ManifestError(InvalidSpecError):
    """A manifest cannot be used. ``findings`` holds everything that is wrong with it."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join(_with_place(finding) for finding in self.findings))


def _with_place(finding: Finding) -> str:
    place = finding.source + (f":{finding.line}" if finding.line else "")
    return f"{place}: {finding}" if place else str(finding)


Path = tuple[str | int, ...]

_NAME = re.compile(r"[^\s\"\x00-\x1f\x7f-\x9f]{1,253}")


def dotted(path: Sequence[str | int]) -> str:
    """Write a path as users do: ("spec", "data", "train", 0) is spec.data.train[0]."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        # A key with a space or a line break is quoted, so that a finding stays on one line.
        name = part if _NAME.fullmatch(part) else shown(part)
        text += f".{name}" if text else name
    return text


def shown(value: Any) -> str:
    """Format a value for a message: as JSON, short and on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def findings_of(
    error: ValidationError,
    model: type[BaseModel],
    *,
    prefix: Path = (),
    source: str = "",
    lines: Mapping[Path, int] | None = None,
) -> list[Finding]:
    """Turn pydantic's errors into findings: camelCase paths, the value, the fix, and the line where known.

    ``model`` is the class that was validated, ``prefix`` its place in the document.
    """
    details = error.errors(include_url=False)
    locations = [_location(detail["loc"]) for detail in details]
    found: dict[tuple[str, str], Finding] = {}
    for detail, location in zip(details, locations, strict=True):
        kind = detail["type"]
        # pydantic also reports a list as too short if its only item is wrong: drop that error.
        if kind == "too_short" and any(len(o) > len(location) and o[: len(location)] == location for o in locations):
            continue
        path = prefix + location
        if kind == "rule":
            blamed = detail["ctx"]["field"]
            path += tuple(blamed.split(".")) if blamed else ()
        finding = Finding("error", dotted(path), _sentence(detail, model), source, _line(path, lines))
        found.setdefault((finding.field, finding.message), finding)
    return sorted(found.values(), key=lambda finding: finding.line or 0)


def _location(loc: tuple[int | str, ...]) -> Path:
    """Drop the part that pydantic adds if a mapping's key is wrong."""
    return tuple(part for part in loc if part != "[key]")


def _line(path: Path, lines: Mapping[Path, int] | None) -> int | None:
    """Return the line of the field, or of the nearest enclosing one that is in the file."""
    if lines is None:
        return None
    for length in range(len(path), -1, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:  # noqa: PLR0911 - one return per case
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return _unknown_field(detail["loc"], model)
        case "missing":
            return "must be set"
        case "literal_error" | "enum":
            return _not_one_of(value, context["expected"])
        case "string_pattern_mismatch":
            return f"{shown(value)} is not valid here; {_hint(context['pattern'])}"
        case "rule":
            return str(context["message"])
        case "count_or_percent":
            return f"{shown(value)}: {detail['msg'].removeprefix('Input ')}"
        case "finite_number":
            return f"{value} is not a finite number"
    wanted = _TYPES.get(kind)
    if wanted:
        hint = _form(kind, model, detail["loc"])
        if isinstance(value, str) and kind.startswith(("int", "float", "bool")):
            hint = _unquoted(value, kind)
        return f"{shown(value)} is not {wanted}{hint}"
    return f"{shown(value)}: {detail['msg'][0].lower()}{detail['msg'][1:]}".replace("input should be", "should be")


_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text; put it in quotes",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}


HUGGING_FACE_MODULES = {
    "q_proj": "attention_qkv",
    "k_proj": "attention_qkv",
    "v_proj": "attention_qkv",
    "qkv_proj": "attention_qkv",
    "o_proj": "attention_dense",
    "gate_proj": "mlp_fc1",
    "up_proj": "mlp_fc1",
    "gate_up_proj": "mlp_fc1",
    "down_proj": "mlp_fc2",
    "all-linear": "all",
}
"""PEFT's names of the modules, with NeMo's, which the spec uses."""


USUAL_NAMES = {
    "lr": "learningRate",
    "minlr": "minLearningRate",
    "batchsize": "globalBatchSize",
    "gbs": "globalBatchSize",
    "maxepochs": "epochs",
    "numtrainepochs": "epochs",
    "valcheckinterval": "validationInterval",
    "gradientclipval": "gradientClip",
    "maxgradnorm": "gradientClip",
    "encoderseqlength": "maxLength",
    "refpolicyklpenalty": "beta",
    "preferenceloss": "loss",
    "losstype": "loss",
    "r": "rank",
    "adapterdim": "rank",
    "lorarank": "rank",
    "loraalpha": "alpha",
    "userslora": "rslora",
    "layerselection": "layers",
    "saveinterval": "everySteps",
    "savesteps": "everySteps",
    "savetopk": "keep",
    "metricforbestmodel": "monitor",
    "earlystoppingpatience": "patience",
    "earlystoppingthreshold": "minDelta",
}
"""Names in NeMo-Aligner, TRL and PEFT of fields that have another name here, in lower case and without _."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant: by another library's name for it, else the most similar."""
    folded = {field.lower().replace("_", ""): field for field in known}
    wanted = name.lower().replace("_", "")
    ours = USUAL_NAMES.get(wanted, "").lower()
    near = [ours] if ours in folded else difflib.get_close_matches(wanted, folded, 1, 0.6)
    return folded[near[0]] if near else None


def _form(kind: str, model: type[BaseModel], loc: Sequence[int | str]) -> str:
    """Return a hint that shows the form of a section or of a list of sections."""
    section = _section_at(model, loc)
    if section is None or kind not in {"model_type", "model_attributes_type", "tuple_type", "list_type"}:
        return ""
    fields = {field.alias or attribute: field.is_required() for attribute, field in section.model_fields.items()}
    if kind.startswith("model"):
        return f"; known here: {', '.join(fields)}"
    example = ", ".join(f"{name}: …" for name, required in fields.items() if required)
    return f"; write it as [{{{example}}}]" if example else ""


def _unquoted(value: str, kind: str) -> str:
    """Return a hint to remove the quotes if only they are wrong."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return ""
    right = isinstance(parsed, bool) if kind.startswith("bool") else isinstance(parsed, int | float)
    return "; remove the quotes" if right else ""


def _not_one_of(value: Any, expected: str) -> str:
    choices = [choice.strip("' ") for choice in expected.replace(" or ", ", ").split(",")]
    if len(choices) == 1:
        return f"{shown(value)} must be {choices[0]}"
    ours = HUGGING_FACE_MODULES.get(str(value))
    if ours in choices:
        return f"{shown(value)} is Hugging Face's name; use {ours}, which includes it"
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{shown(value)} is not one of {', '.join(choices)}{hint}"


def _unknown_field(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    section = _section_at(model, loc[:-1])
    name = str(loc[-1])
    if section is None:
        return "unknown field"
    gone = [entry.answer for entry in section.removed if entry.field == name] if issubclass(section, Section) else []
    if gone:
        return f"unknown field; {gone[0]}"
    known = [field.alias or attribute for attribute, field in section.model_fields.items()]
    if name in section.model_fields:
        return f"unknown field; did you mean {section.model_fields[name].alias}?"
    near = nearest(name, known)
    if near:
        return f"unknown field; did you mean {near}?"
    folded = name.lower().replace("_", "")
    elsewhere = _paths_named(model, USUAL_NAMES.get(folded, folded).lower())
    if elsewhere:
        return f"unknown field here; did you mean {' or '.join(elsewhere[:2])}?"
    return f"unknown field; known here: {', '.join(known)}"


def _section_at(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    """Return the section class at the end of a path of aliases, or None."""
    section: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):
            continue
        if section is None:
            return None
        by_alias = {field.alias or attribute: field for attribute, field in section.model_fields.items()}
        section = section_class(by_alias[part].annotation) if part in by_alias else None
    return section


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the model class inside an annotation such as ``Lora | None`` or ``tuple[DataSource, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = section_class(argument)
        if found is not None:
            return found
    return None


def _paths_named(model: type[BaseModel], name: str, prefix: str = "") -> list[str]:
    """Return the paths of all fields with this name, which is given in lower case."""
    paths: list[str] = []
    for attribute, field in model.model_fields.items():
        alias = field.alias or attribute
        path = f"{prefix}.{alias}" if prefix else alias
        if alias.lower() == name:
            paths.append(path)
        inner = section_class(field.annotation)
        if inner is not None:
            paths += _paths_named(inner, name, path)
    return paths


def _hint(pattern: str) -> str:
    return PATTERN_HINTS.get(pattern, f"it must match {pattern}")


def placed(findings: Iterable[Finding], source: str, lines: Mapping[Path, int]) -> list[Finding]:
    """Add the file and line to findings that were made from a parsed spec."""
    by_field = {dotted(path): line for path, line in lines.items()}

    def line(field: str) -> int | None:
        while field and field not in by_field:
            cut = max(field.rfind("."), field.rfind("["))
            field = field[:cut] if cut > 0 else ""
        return by_field.get(field)

    return [replace(finding, source=source, line=line(finding.field)) for finding in findings]
