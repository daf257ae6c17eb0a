"""Generates the CustomResourceDefinition: ``python -m dpo_api.crd > crds/dpojobs.yaml``.

The API server needs a structural schema, so pydantic's JSON schema is rewritten: references are inlined, optional
fields lose their null, ``const`` becomes ``enum``, exclusive bounds use OpenAPI's older form, and
``additionalProperties: false`` is removed (unknown fields are pruned or refused anyway). A construct without a rule
here is an error; nothing is guessed.

Defaults are described but not written into the schema, so that a stored spec stays as its author wrote it even if a
later version has other defaults.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml
from pydantic import BaseModel

from dpo_api.fields import PATTERN_HINTS
from dpo_api.manifest import GROUP, KIND, NAME_MAX, VERSION
from dpo_api.spec import DPOJobSpec
from dpo_api.status import DPOJobStatus

Schema = dict[str, Any]

MUTABLE = frozenset({"runPolicy"})
"""Sections of the spec that may change after acceptance."""

KEPT = frozenset(
    {
        "description",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "pattern",
        "properties",
        "required",
        "type",
        "x-kubernetes-int-or-string",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-list-type",
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-validations",
    }
)
DROPPED = frozenset({"$defs", "default", "title", "propertyNames"})
"""Structural schemas do not allow ``propertyNames``: keys of maps are checked when a job is accepted."""

PYDANTIC = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
"""pydantic keeps its own names for bounds outside a type's validator, as in ``Int | None``."""


def structural(model: type[BaseModel]) -> Schema:
    """Return a model's schema in the structural form. Raises ValueError for a construct without a rule."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _rewrite(schema, schema.get("$defs", {}), model.__name__)


def _rewrite(schema: Schema, definitions: dict[str, Schema], where: str) -> Schema:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        schema = {**definitions[name], **{key: value for key, value in schema.items() if key != "$ref"}}
        return _rewrite(schema, definitions, where)
    if "anyOf" in schema:
        return _rewrite(_without_any_of(schema, where), definitions, where)
    out: Schema = {}
    for key in sorted(schema):
        value = schema[key]
        if key == "properties":
            out[key] = {name: _rewrite(child, definitions, f"{where}.{name}") for name, child in value.items()}
        elif key == "items":
            out[key] = _rewrite(value, definitions, f"{where}[]")
        elif key in {"additionalProperties", "patternProperties"}:
            values = _map_values(value if key == "additionalProperties" else next(iter(value.values())), schema, where)
            if values is not None:
                out["additionalProperties"] = _rewrite(values, definitions, f"{where}.*")
        elif key not in DROPPED:
            out |= _keyword(key, value, where)
    return _finished(out, where)


def _map_values(values: Schema | bool, schema: Schema, where: str) -> Schema | None:
    """Return the schema of a map's values, or None if unknown fields are refused or may have any value."""
    if isinstance(values, dict):
        return values
    if values and "x-kubernetes-preserve-unknown-fields" not in schema:
        raise ValueError(f"{where}: an open object must set x-kubernetes-preserve-unknown-fields")
    return None


def _keyword(key: str, value: Any, where: str) -> Schema:
    """Rewrite one keyword that holds no schema."""
    key = PYDANTIC.get(key, key)
    if key == "const":
        return {"enum": [value]}
    if key in {"exclusiveMinimum", "exclusiveMaximum"}:
        return {key.removeprefix("exclusive").lower(): value, key: True}
    if key in KEPT:
        return {key: value}
    raise ValueError(f"{where}: {key!r} is not allowed in a structural schema; add a rule for it to dpo_api.crd")


def _without_any_of(schema: Schema, where: str) -> Schema:
    """Rewrite ``X or null`` to X, and ``integer or string`` to Kubernetes' int-or-string."""
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    choices = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
    if len(choices) == 1:
        return {**choices[0], **rest}
    if {choice.get("type") for choice in choices} == {"integer", "string"}:
        merged: Schema = {}
        for choice in choices:
            merged |= {key: value for key, value in choice.items() if key != "type"}
        return merged | rest | {"x-kubernetes-int-or-string": True}
    raise ValueError(f"{where}: structural schemas allow no union other than null or int-or-string")


def _finished(schema: Schema, where: str) -> Schema:
    """Add the keywords that every schema of a type needs, and check that everything has a bound."""
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    elif schema.get("type") == "integer":
        schema["format"] = "int64"
    if schema.get("pattern") in PATTERN_HINTS:
        # A rule's message says what to write; a pattern's would print a regular expression.
        pattern = schema.pop("pattern")
        matches = f"self.matches({json.dumps(pattern)})"
        rule = f"type(self) == int || {matches}" if "x-kubernetes-int-or-string" in schema else matches
        schema["x-kubernetes-validations"] = [{"rule": rule, "message": PATTERN_HINTS[pattern]}]
    if schema.get("type") == "string" and not ("enum" in schema or "maxLength" in schema):
        raise ValueError(f"{where}: text needs maxLength or enum")
    if schema.get("type") == "array" and "maxItems" not in schema:
        raise ValueError(f"{where}: a list needs maxItems")
    if "additionalProperties" in schema and "maxProperties" not in schema:
        raise ValueError(f"{where}: a map needs maxProperties")
    if not (schema.get("type") or schema.get("x-kubernetes-int-or-string")):
        raise ValueError(f"{where}: has no type")
    return schema


ACCEPTED = "has(oldSelf.status) && (has(oldSelf.status.acceptedSpecDigest) || has(oldSelf.status.configMap))"
"""Whether a job is accepted. Version 0.1.0 wrote no digest, but the name of the ConfigMap."""


def _immutable(spec: Schema) -> list[Schema]:
    """Return one rule of the whole object for each section, so that the message names the section that was changed.

    Rules of the spec itself could not see whether the job is accepted. Every write evaluates all of them, those of the
    status too, and reading one field costs the API server more the more fields are beside it. So a rule compares its
    section first, and reads the status only if that differs.
    """
    rules = []
    for name in spec["properties"]:
        if name in MUTABLE:
            continue
        if name in spec["required"]:
            kept = f"self.spec.{name} == oldSelf.spec.{name}"
        else:
            new, old = f"self.spec.{name}", f"oldSelf.spec.{name}"
            kept = f"(has({new}) ? has({old}) && {new} == {old} : !has({old}))"
        rules.append(
            {
                "rule": f"{kept} || !({ACCEPTED})",
                "message": f"{name} cannot be changed after acceptance (only runPolicy can); create another DPOJob",
                "fieldPath": f".spec.{name}",
                "reason": "FieldValueForbidden",
            }
        )
    return rules


CLUSTER_RULES: list[Schema] = [
    {
        "rule": "has(self.checkpoint) && has(self.checkpoint.uri)",
        "message": "checkpoint.uri must be set on a cluster: the run directory, such as s3://runs/my-job/",
        "fieldPath": ".checkpoint.uri",
        "reason": "FieldValueRequired",
    },
    {
        "rule": "has(self.resources) && has(self.resources.gpusPerNode)",
        "message": "resources.gpusPerNode must be set on a cluster: the GPUs of each pod, or 0 to train on CPU",
        "fieldPath": ".resources.gpusPerNode",
        "reason": "FieldValueRequired",
    },
]
"""Fields that are required on a cluster only; `dpo run` has defaults for them."""

NAME_RULE: Schema = {
    "rule": f"self.metadata.name.size() <= {NAME_MAX} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    "message": f"metadata.name must be at most {NAME_MAX} lower-case letters, digits and -, starting with a letter:"
    " names of pods and services are built from it",
}


def _column(name: str, path: str, description: str, *, kind: str = "string", wide: bool = False) -> Schema:
    column = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return column | ({"priority": 1} if wide else {})


COLUMNS: list[Schema] = [
    _column("State", ".status.state", "The job's state in one word."),
    _column("Step", ".status.summary.step", "Optimizer steps done and planned."),
    _column("Acc", ".status.summary.accuracy", "Share of pairs whose chosen reward is higher."),
    _column("Margin", ".status.summary.margin", "Chosen reward minus rejected reward."),
    _column("Restarts", ".status.restarts", "Attempts after the first.", kind="integer"),
    _column("Nodes", ".status.nodes", "Nodes of an attempt.", kind="integer"),
    _column("Age", ".metadata.creationTimestamp", "Time since creation.", kind="date"),
    _column("Loss", ".status.summary.loss", "Training loss.", wide=True),
    _column("ETA", ".status.summary.eta", "Time left.", wide=True),
    _column("GPUs", ".spec.resources.gpusPerNode", "GPUs of each node.", kind="integer", wide=True),
    _column("Layout", ".status.summary.layout", "Tensor, pipeline and data parallel size.", wide=True),
    _column("Queue", ".status.queue", "Kueue LocalQueue.", wide=True),
    _column("Message", ".status.message", "One sentence about the state.", wide=True),
]


def custom_resource_definition() -> Schema:
    """Return the whole CustomResourceDefinition."""
    spec = structural(DPOJobSpec)
    spec["x-kubernetes-validations"] = [*spec.get("x-kubernetes-validations", []), *CLUSTER_RULES]
    spec["description"] = "What to train, on what, how and where. Only runPolicy can be changed after acceptance."
    status = structural(DPOJobStatus)
    status["description"] = "The observed state of the job; written by the operator."
    root = {
        "type": "object",
        "description": "A job that aligns a model with preference data by Direct Preference Optimization.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{KIND}."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [NAME_RULE, *_immutable(spec)],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": root},
        "subresources": {"status": {}},
        "additionalPrinterColumns": COLUMNS,
    }
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": "dpojobs",
        "singular": "dpojob",
        "shortNames": ["dpo"],
        "categories": ["all"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"dpojobs.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


class _Dumper(yaml.SafeDumper):
    """Writes every object in full, without YAML anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the signature is PyYAML's
        return True


HEADER = "# Generated by `make generate` from crds/dpo_api. Do not edit.\n"


def to_yaml() -> str:
    """Return the text of crds/dpojobs.yaml."""
    body = yaml.dump(custom_resource_definition(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return HEADER + body


if __name__ == "__main__":
    sys.stdout.write(to_yaml())
