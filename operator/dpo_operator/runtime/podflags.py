"""Flags that are defaults of a job's fields, mostly of its pods, and the pod patch.

Those that are fields of a podTemplate are read by its class, which says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_api.errors import DPOError
from dpo_api.fields import SECONDS_MAX
from dpo_api.findings import Finding, ManifestError, findings_of, placed
from dpo_api.manifest import load_documents
from dpo_api.overlay import TOPOLOGY, reserved_keys
from dpo_api.pods import PodTemplate
from dpo_operator.backend import podpatch
from dpo_operator.config import Settings

_FIELDS = {
    "trainer_annotations": "annotations",
    "trainer_node_selector": "nodeSelector",
    "trainer_tolerations": "tolerations",
    "trainer_runtime_class": "runtimeClassName",
    "trainer_priority_class": "priorityClassName",
}
"""The field of podTemplate that each flag is a default of."""
_JSON = ("trainer_annotations", "trainer_tolerations")
"""The flags whose values may contain any character; their text is JSON."""


_TTL = "default_ttl_seconds_after_finished"


class FlagError(Exception):
    """A flag has a wrong value; the message names it."""


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of these flags. ``given`` holds text, or pairs for the node selector.

    Raises FlagError for the first wrong one.
    """
    found: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value = given.get(name)
        if not value:
            found[name] = getattr(Settings, name)
            continue
        flag = f"--{name.replace('_', '-')}"
        if name in _JSON:
            value = _json(flag, value)
        value = dict(value) if name == "trainer_node_selector" else value
        found[name] = _checked(flag, field, value)
    found[_TTL] = _seconds(given.get(_TTL) or "")
    found["trainer_pod_patch"] = _patch(given.get("trainer_pod_patch") or "")
    return found


def _seconds(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) > SECONDS_MAX:
        raise FlagError(f"--{_TTL.replace('_', '-')}: {text!r} is not a whole number from 0 to {SECONDS_MAX}")
    return int(text)


def _patch(file: str) -> dict[str, Any]:
    try:
        return load_patch(Path(file)) if file else {}
    except DPOError as error:
        raise FlagError(f"--trainer-pod-patch: {error}") from None


def load_patch(file: Path) -> dict[str, Any]:
    """Return the patch in a file; an empty one is no patch. Raises ManifestError, or NotFoundError if it is missing."""
    documents = load_documents(file)
    if not documents:
        return {}
    if len(documents) > 1:
        raise ManifestError([Finding("error", "", f"holds {len(documents)} documents; one is expected", str(file))])
    value, lines = documents[0].value, documents[0].lines
    found = placed(podpatch.check(value), str(file), lines)
    if found:
        raise ManifestError(found)
    patch: dict[str, Any] = value
    return patch


def _json(flag: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise FlagError(f"{flag}: {text!r} is not JSON: {error}") from None


def _checked(flag: str, field: str, value: Any) -> Any:
    try:
        template = PodTemplate.model_validate({field: value}, by_alias=True, by_name=False)
    except ValidationError as error:
        wrong = findings_of(error, PodTemplate)[0]
        raise FlagError(_said(flag, field, wrong)) from None
    for finding in reserved_keys(template.annotations, "annotations", allowed=TOPOLOGY):
        raise FlagError(f"{flag}: {finding.message}")
    match field:
        case "annotations":
            return tuple(template.annotations.items())
        case "nodeSelector":
            return tuple(template.node_selector.items())
        case "tolerations":
            return template.tolerations
    return value


def _said(flag: str, field: str, finding: Finding) -> str:
    """Write a finding about a podTemplate as one about a flag: ``tolerations[0].effect`` is ``[0].effect`` there."""
    place = finding.field.removeprefix(field).removeprefix(".")
    return f"{flag}: {place}: {finding.message}" if place else f"{flag}: {finding.message}"
