"""The CRD's types and bounds and our own say the same of every field, and garbage is refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_api.cluster import uris
from dpo_api.crd import custom_resource_definition
from dpo_api.fields import PATTERN_HINTS
from dpo_api.findings import ManifestError
from dpo_api.manifest import load_documents, parse_job
from dpo_api.validation import check
from dpo_testing.crd_schema import problems

ROOT = Path(__file__).parents[2]
SCHEMA = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
COMPLETE = load_documents(ROOT / "tests/golden/api/v1alpha1/complete.yaml")[0].value

VALUES: list[Any] = [
    -1,
    0,
    1,
    2.0,
    1.5,
    1e-7,
    2**31,
    1e18,
    True,
    "",
    "x",
    "A b",
    "10%",
    "0%",
    "101%",
    "5",
    "s3://bucket/key",
    "S3://bucket",
    "s3://b",
    "pvc://claim",
    "http://host/x",
    "64Gi",
    "x" * 5000,
    [],
    ["x"],
    [1, 1],
    [0.5, 0.5],
    ["x"] * 2000,
    {},
    {"x": 1},
    {"name": "a"},
]


def leaves(schema: dict[str, Any], value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a document that the schema describes."""
    yield path
    if isinstance(value, dict) and "properties" in schema:
        for name, child in value.items():
            yield from leaves(schema["properties"][name], child, (*path, name))
    elif isinstance(value, list) and value and "items" in schema:
        yield from leaves(schema["items"], value[0], (*path, 0))


PLACES = [path for path in leaves(SCHEMA["properties"]["spec"], COMPLETE["spec"], ("spec",)) if len(path) > 1]


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The complete manifest with one other value; for a section's field, without the sections that may be absent."""
    sections = {*SCHEMA["properties"]["spec"]["required"], path[1]}
    spec = {name: section for name, section in COMPLETE["spec"].items() if name in sections}
    document = copy.deepcopy({**COMPLETE, "spec": spec})
    target: Any = document
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    return document  # type: ignore[no-any-return]


def rule_messages() -> set[str]:
    found: set[str] = set(PATTERN_HINTS.values())

    def walk(schema: dict[str, Any]) -> None:
        found.update(rule["message"] for rule in schema.get("x-kubernetes-validations", ()))
        for child in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
            if isinstance(child, dict):
                walk(child)

    walk(SCHEMA)
    return found


BY_RULE = rule_messages()
# Said at acceptance, since a structural schema has no word for it.
AT_ACCEPTANCE = ("unknown field", "above 0%", "write a label key", "to 100%")


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(str(part) for part in path))
def test_schema_and_classes_agree(path: tuple[Any, ...]) -> None:
    for value in VALUES:
        document = changed(path, value)
        by_schema = problems(SCHEMA, document)
        try:
            parse_job(document)
        except ManifestError as error:
            for finding in error.findings:
                assert "\n" not in finding.message
                if not by_schema:
                    known = any(words in finding.message for words in (*BY_RULE, *AT_ACCEPTANCE))
                    assert known, f"only the classes refuse {value!r:.60}: {finding}"
        else:
            assert by_schema == [], f"only the schema refuses {value!r:.60}"


garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


@given(path=st.sampled_from(PLACES), value=garbage)
@settings(max_examples=300, deadline=None)
@pytest.mark.slow
def test_garbage_is_a_finding_and_never_another_exception(path: tuple[Any, ...], value: Any) -> None:
    findings = []
    try:
        job = parse_job(changed(path, value))
    except ManifestError as error:
        findings += error.findings
    else:
        findings += check(job.spec, train_pairs=1000, on_cluster=True)
        assert parse_job(job.to_dict()) == job
    assert all(finding.message and "\n" not in str(finding) for finding in findings)


@given(value=garbage)
@settings(max_examples=100, deadline=None)
def test_garbage_for_a_manifest_is_a_finding(value: Any) -> None:
    with pytest.raises(ManifestError):
        parse_job(value)


def places(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield field and value of every URI in a document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in {"uri", "cacheURI", "architectureURI"}:
                yield f"{where}.{key}", inner
            else:
                yield from places(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, f"{where}[{index}]")


@pytest.mark.parametrize("name", ["complete", "other-forms"])
def test_every_uri_of_a_spec_is_found(name: str) -> None:
    document = load_documents(ROOT / f"tests/golden/api/v1alpha1/{name}.yaml")[0].value
    document["spec"]["data"]["train"] += [{"uri": "s3://prefs/more.jsonl", "storage": {"region": "eu-2"}}]
    found = list(uris(parse_job(document).spec))
    assert sorted((where, uri) for where, uri, _ in found) == sorted(places(document["spec"], "spec"))
    last = f"spec.data.train[{len(document['spec']['data']['train']) - 1}].uri"
    assert [access.region for where, _, access in found if where == last and access is not None] == ["eu-2"]
