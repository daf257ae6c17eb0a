"""Manifests for tests: a smallest valid one, changed at dotted paths."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_api.manifest import API_VERSION, KIND, DPOJob, parse_job
from dpo_api.spec import DPOJobSpec

MINIMAL: dict[str, Any] = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "metadata": {"name": "job"},
    "spec": {
        "model": {"huggingFace": {"uri": "s3://models/tiny/"}},
        "data": {"train": [{"uri": "s3://prefs/train.jsonl"}]},
        "resources": {"gpusPerNode": 8},
        "checkpoint": {"uri": "s3://runs/job/"},
        "storage": {"credentialsSecretRef": {"name": "s3-credentials"}},
    },
}
"""The smallest manifest that a cluster accepts without a warning."""


def parts(path: str) -> list[str | int]:
    """Split ``spec.data.train[0].uri`` into its names and indices."""
    return [int(index) if index else name for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)]


def set_at(value: Any, path: str, new: Any) -> None:
    """Set a dotted path in nested mappings and lists; mappings on the way are made."""
    *way, last = parts(path)
    for part in way:
        value = value[part] if isinstance(part, int) else value.setdefault(part, {})
    if isinstance(last, int) and last == len(value):
        value.append(new)
    else:
        value[last] = new


def delete_at(value: Any, path: str) -> None:
    """Remove a dotted path."""
    *way, last = parts(path)
    for part in way:
        value = value[part]
    del value[last]


def manifest(changes: Mapping[str, Any] | None = None, removed: Iterable[str] = ()) -> dict[str, Any]:
    """Return the minimal manifest with values set, or removed, at dotted paths such as ``spec.dpo.beta``."""
    made = copy.deepcopy(MINIMAL)
    for path in removed:
        delete_at(made, path)
    for path, new in (changes or {}).items():
        set_at(made, path, copy.deepcopy(new))
    return made


def job(changes: Mapping[str, Any] | None = None, removed: Iterable[str] = ()) -> DPOJob:
    """Return the same, parsed."""
    return parse_job(manifest(changes, removed))


def spec(changes: Mapping[str, Any] | None = None, removed: Iterable[str] = ()) -> DPOJobSpec:
    """Return the parsed spec; the paths are relative to it (``dpo.beta``)."""
    under = {f"spec.{path}": value for path, value in (changes or {}).items()}
    return job(under, [f"spec.{path}" for path in removed]).spec
