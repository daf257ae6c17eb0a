"""Every wrong manifest of tests/golden/api/refused.yaml is refused by the words it names, where it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_api.crd import custom_resource_definition
from dpo_api.findings import USUAL_NAMES, Finding, ManifestError
from dpo_api.manifest import load_documents, parse_job
from dpo_api.validation import check
from dpo_testing.crd_schema import problems, unknown_fields
from dpo_testing.manifests import MINIMAL, manifest

CASES: list[dict[str, Any]] = load_documents(Path(__file__).parents[1] / "golden/api/refused.yaml")[0].value
SCHEMA = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def made(case: dict[str, Any]) -> dict[str, Any]:
    return manifest(case.get("set"), case.get("unset", ()))


def findings(document: dict[str, Any]) -> list[Finding]:
    try:
        job = parse_job(document)
    except ManifestError as error:
        return list(error.findings)
    return [finding for finding in check(job.spec, on_cluster=True) if finding.level == "error"]


def rule_messages(schema: dict[str, Any]) -> list[str]:
    found = [rule["message"] for rule in schema.get("x-kubernetes-validations", ())]
    for child in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
        if isinstance(child, dict):
            found += rule_messages(child)
    return found


def test_the_manifest_that_the_cases_change_is_right() -> None:
    assert findings(manifest()) == []
    assert problems(SCHEMA, MINIMAL) == []
    assert unknown_fields(SCHEMA, MINIMAL) == []


def test_names_of_other_libraries_stand_for_fields_that_exist() -> None:
    fields: set[str] = set()

    def collect(schema: dict[str, Any]) -> None:
        for name, child in schema.get("properties", {}).items():
            fields.add(name)
            collect(child)
        if "items" in schema:
            collect(schema["items"])

    collect(SCHEMA)
    assert set(USUAL_NAMES.values()) <= fields
    assert not any(name in {field.lower() for field in fields} for name in USUAL_NAMES)


def test_names_of_cases_are_unique() -> None:
    names = [case["name"] for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_our_refusal_names_field_value_and_fix(case: dict[str, Any]) -> None:
    found = findings(made(case))
    assert any(f.field == case["field"] and case["says"] in f.message for f in found), [str(f) for f in found]
    # One mistake, one finding: no echoes that hide it.
    assert len(found) == 1, [str(f) for f in found]


@pytest.mark.parametrize("case", [case for case in CASES if case["at"] == "schema"], ids=lambda case: str(case["name"]))
def test_the_schema_alone_refuses(case: dict[str, Any]) -> None:
    assert problems(SCHEMA, made(case)) != []


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["at"] in {"rule", "cluster-rule", "accept"}],
    ids=lambda case: str(case["name"]),
)
def test_the_schema_alone_does_not_refuse_what_a_rule_must(case: dict[str, Any]) -> None:
    document = made(case)
    assert problems(SCHEMA, document) == []
    if case["at"] != "accept":
        words = case["says"]
        assert any(words in message for message in rule_messages(SCHEMA)), f"no CEL rule says {words!r}"


@pytest.mark.parametrize("case", [case for case in CASES if case["at"] == "pruned"], ids=lambda case: str(case["name"]))
def test_strict_field_validation_names_the_unknown_field(case: dict[str, Any]) -> None:
    assert unknown_fields(SCHEMA, made(case)) == [case["field"]]


def test_every_rule_has_a_case() -> None:
    """A rule that no case needs could be dropped without a test noticing."""
    said = [case["says"] for case in CASES]
    immutable = "cannot be changed after acceptance"
    unproven = {m for m in rule_messages(SCHEMA) if immutable not in m and not any(words in m for words in said)}
    assert unproven == set()
