"""The generated CustomResourceDefinition: no drift, structural, bounded, described; and the same for the docs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field

from dpo_api import crd, docs
from dpo_api.fields import Section, Text
from dpo_api.spec import DPOJobSpec
from dpo_api.status import ConditionType

ROOT = Path(__file__).parents[2]
CRD = crd.custom_resource_definition()
VERSION = CRD["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]


def walk(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(schema.get(key), dict):
            yield from walk(schema[key], path + mark)


OBJECT_META = {"", ".metadata", ".apiVersion", ".kind"}  # Kubernetes' own
SCHEMAS = [(path, schema) for path, schema in walk(SCHEMA) if path not in OBJECT_META]
PATHS = {path for path, _ in SCHEMAS}


def at(path: str) -> dict[str, Any]:
    return next(schema for where, schema in SCHEMAS if where == path)


def test_the_files_are_what_the_classes_generate() -> None:
    assert (ROOT / "crds/dpojobs.yaml").read_text() == crd.to_yaml(), "run `make generate`"
    assert (ROOT / "docs/api.md").read_text() == docs.reference(), "run `make generate`"


def test_the_yaml_says_what_was_generated() -> None:
    assert yaml.safe_load(crd.to_yaml()) == CRD


def test_it_can_be_applied_by_kubectl_s_client_side_apply() -> None:
    # kubectl stores the object in an annotation; all annotations together are bounded.
    assert len(crd.to_yaml().encode()) < 262_144


def test_every_place_is_structural_and_bounded() -> None:
    """What Kubernetes' documentation asks of a structural schema, and bounds for the cost of CEL rules."""
    for path, schema in SCHEMAS:
        assert_structural(path, schema)


def assert_structural(path: str, schema: dict[str, Any]) -> None:
    forbidden = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "not", "const", "title", "default", "propertyNames"}
    assert not forbidden & set(schema), path
    if schema.get("x-kubernetes-int-or-string"):
        assert "type" not in schema, path
        assert "maxLength" in schema, path
    else:
        assert schema["type"] in {"object", "array", "string", "integer", "number", "boolean"}
    for bound in ("exclusiveMinimum", "exclusiveMaximum"):
        assert schema.get(bound) in {None, True}
        if bound in schema:
            assert bound.removeprefix("exclusive").lower() in schema, path
    assert not ("properties" in schema and "additionalProperties" in schema), path
    kind = schema.get("type")
    if kind == "string":
        assert "maxLength" in schema or "enum" in schema, path
    if kind == "array":
        assert "maxItems" in schema, path
    if kind == "object" and "additionalProperties" in schema:
        assert "maxProperties" in schema, path
    if kind in {"integer", "number"} and path.startswith(".spec"):
        assert {"minimum", "maximum"} <= set(schema), f"{path}: numbers of the spec have a range"
    if kind == "integer":
        assert schema["format"] == "int64", path
        assert abs(schema.get("maximum", 0)) < 2**53


def test_every_field_explains_itself() -> None:
    required = {f"{p}.{name}" for p, s in SCHEMAS for name in s.get("required", ())}
    for path, schema in SCHEMAS:
        if path.endswith(("[]", ".*")):
            continue
        text = schema["description"]
        assert text.endswith("."), path
        assert len(text) > 5, path
        scalar = schema.get("type") not in {"object", "array"} and path.startswith(".spec")
        if scalar and path not in required | _PLAIN:
            said = any(words in text for words in ("Default", "Not set", "set on a cluster"))
            assert said, f"{path}: an optional value says what leaving it out means"


_PLAIN = {
    ".spec.podTemplate.env[].value",
    ".spec.podTemplate.env[].valueFrom",
    ".spec.podTemplate.tolerations[].value",
    ".spec.podTemplate.volumeMounts[].subPath",
    ".spec.podTemplate.security.fsGroup",
    ".spec.data.train[].storage",
    *(
        f"{where}.{end}"
        for where in [path for path, _ in SCHEMAS if path.endswith(".caBundle")]
        for end in ("key", "path")
    ),
    ".spec.model.megatron.architectureURI",
}
"""Fields without which nothing happens."""


def field_defaults(model: type[BaseModel], path: str = ".spec") -> Iterator[tuple[str, Any]]:
    from dpo_api.findings import section_class

    for attribute, field in model.model_fields.items():
        where = f"{path}.{field.alias or attribute}"
        inner = section_class(field.annotation)
        if inner is not None:
            mark = "[]" if str(field.annotation).startswith("tuple") else ""
            yield from field_defaults(inner, where + mark)
        elif not field.is_required() and field.default not in (None, (), {}):
            yield where, field.default


@pytest.mark.parametrize(("path", "default"), list(field_defaults(DPOJobSpec)), ids=str)
def test_a_description_names_the_default_that_the_class_has(path: str, default: Any) -> None:
    text = at(path)["description"]
    if path.endswith(".caBundle.key"):
        return
    said = text.rpartition("Default ")[2].rstrip(".")
    if isinstance(default, bool):
        assert said.split(":")[0] == str(default).lower()
    elif isinstance(default, int | float):
        assert float(said.split(":")[0]) == default
    elif isinstance(default, tuple):
        assert said == "[" + ", ".join(str(item) for item in default) + "]"
    else:
        assert said.split(":")[0] == default


def test_no_default_is_written_into_the_schema() -> None:
    assert all("default" not in schema for _, schema in SCHEMAS)


def test_every_section_but_one_is_immutable_and_the_message_names_it() -> None:
    rules = [rule for rule in SCHEMA["x-kubernetes-validations"] if "oldSelf" in rule["rule"]]
    names = {rule["fieldPath"].removeprefix(".spec.") for rule in rules}
    assert names == set(at(".spec")["properties"]) - {"runPolicy"}
    for rule in rules:
        name = rule["fieldPath"].removeprefix(".spec.")
        assert rule["message"].startswith(f"{name} cannot be changed")
        assert f"self.spec.{name} == oldSelf.spec.{name}" in rule["rule"]
        for field in ("acceptedSpecDigest", "configMap"):  # 0.1.0 wrote only the second
            assert f"has(oldSelf.status.{field})" in rule["rule"]
        # A transition rule on the field itself would let it be added or removed.
        new, old = f"self.spec.{name}", f"oldSelf.spec.{name}"
        kept = f"{new} == {old}"
        if name not in at(".spec")["required"]:
            kept = f"(has({new}) ? has({old}) && {kept} : !has({old}))"
        # The spec first: a rule that reads the status at each write costs the API server twice as much.
        assert rule["rule"].startswith(f"{kept} || !(")


def test_rules_blame_a_field_that_exists() -> None:
    for path, schema in SCHEMAS:
        for rule in schema.get("x-kubernetes-validations", ()):
            assert "\n" not in rule["message"]
            assert path + rule.get("fieldPath", "") in PATHS


def test_columns_show_what_the_page_promises() -> None:
    columns = VERSION["additionalPrinterColumns"]
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert shown == ["State", "Step", "Acc", "Margin", "Restarts", "Nodes", "Age"]
    for column in columns:
        if not column["jsonPath"].startswith(".metadata"):
            kind = at(column["jsonPath"])["type"]
            assert kind == column["type"]


def test_names_and_subresource() -> None:
    names = CRD["spec"]["names"]
    assert CRD["metadata"]["name"] == "dpojobs.dpo-operator.dev"
    assert (names["plural"], names["kind"], names["shortNames"]) == ("dpojobs", "DPOJob", ["dpo"])
    assert VERSION["subresources"] == {"status": {}}
    assert CRD["spec"]["scope"] == "Namespaced"


def test_conditions_are_a_list_map_of_metav1_form() -> None:
    conditions = at(".status.conditions")
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]
    item = conditions["items"]
    assert set(item["required"]) == {"type", "status", "lastTransitionTime", "reason", "message"}
    assert item["properties"]["status"]["enum"] == ["True", "False", "Unknown"]
    names = {kind.value for kind in ConditionType}
    assert {"Accepted", "Progressing", "Finished", "Succeeded", "Failed", "TrainingStalled"} <= names
    assert "Stalled" in names  # kstatus reads it as failed
    assert "Ready" not in names  # kstatus would wait for it


def structural(annotation: Any, **field: Any) -> dict[str, Any]:
    model = type(
        "Made", (Section,), {"__annotations__": {"value": annotation}, "value": Field(**field), "__module__": __name__}
    )
    return crd.structural(model)["properties"]["value"]  # type: ignore[no-any-return]


def test_what_pydantic_writes_otherwise_is_rewritten() -> None:
    assert structural(float, gt=0, lt=1) == {
        "type": "number",
        "minimum": 0,
        "exclusiveMinimum": True,
        "maximum": 1,
        "exclusiveMaximum": True,
    }
    assert structural(Literal["a"]) == {"type": "string", "enum": ["a"]}
    assert structural(int | None, default=None, ge=1) == {"type": "integer", "minimum": 1, "format": "int64"}
    assert structural(dict[str, int], max_length=3) == {
        "type": "object",
        "additionalProperties": {"type": "integer", "format": "int64"},
        "maxProperties": 3,
    }


@pytest.mark.parametrize(
    ("annotation", "field", "says"),
    [
        (int | bool, {}, "allow no union other than"),
        (Text, {}, "text needs maxLength"),
        (tuple[int, ...], {}, "a list needs maxItems"),
        (dict[str, int], {}, "a map needs maxProperties"),
        (dict[str, Any], {"max_length": 2}, "x-kubernetes-preserve-unknown-fields"),
        (tuple[int, str], {}, "is not allowed in a structural schema"),
        (Any, {}, "has no type"),
    ],
)
def test_what_has_no_rule_is_an_error_and_no_guess(annotation: Any, field: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        structural(annotation, **field)
