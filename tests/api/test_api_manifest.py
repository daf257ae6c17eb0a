"""Manifests are read as kubectl reads them, and mistakes are reported with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import NotFoundError
from dpo_api.findings import ManifestError
from dpo_api.manifest import load_documents, load_manifest, load_manifests, parse_job
from dpo_testing.manifests import MINIMAL, job, manifest

HEAD = "apiVersion: dpo-operator.dev/v1alpha1\nkind: DPOJob\nmetadata: {name: a}\n"
SPEC = "spec:\n  model: {huggingFace: {uri: x}}\n  data: {train: [{uri: y}]}\n"


def value(text: str) -> Any:
    return load_documents(f"value: {text}\n")[0].value["value"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9e-7", 9e-7),
        ("9.0e-7", 9e-7),
        ("9E-7", 9e-7),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+1", 1),
        ("-1", -1),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 15),
        ("089", 89.0),
        ("0b11", 3),
        ("1:30", "1:30"),  # no base-60 numbers
        ("2024-01-01", "2024-01-01"),  # no dates
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("10%", "10%"),
        ("1.2.3", "1.2.3"),
        ("'5'", "5"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("null", None),
        ("'null'", "null"),
        ("=", "="),
        ("[1, 2.0]", [1, 2.0]),
        ("{1: a, true: b}", {"1": "a", "true": "b"}),
    ],
)
def test_scalars_are_go_s(text: str, expected: Any) -> None:
    read = value(text)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", ".NaN"])
def test_numbers_that_json_has_not_are_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="not a finite number"):
        value(text)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, 'the key "a" appears twice; the first is on line 1'),
        ("a:\n  - b\n - c\n", 3, "expected <block end>"),
        ("a: [1, 2\nb: 3\n", 2, "while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", 2, "cannot start any token"),
        ("a: &x {b: *x}\n\n", 1, "aliases"),
        ("a: !!python/object:os.system {}\n\n", 1, "the tag !!python/object:os.system"),
        ("a: !!binary aGk=\n\n", 1, "the tag !!binary"),
        ("a: !!timestamp 2024-01-01\n\n", 1, "the tag !!timestamp"),
        ("a: !secret x\n\n", 1, "the tag !secret"),
        ("? [a]\n: b\n", 1, "a key must be plain text"),
    ],
)
def test_broken_yaml_is_told_with_its_line(tmp_path: Path, text: str, line: int | None, says: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        load_manifests(path)
    (finding,) = caught.value.findings
    assert finding.source == str(path)
    if line is not None:
        assert finding.line == line
    assert says in finding.message
    assert "\n" not in str(caught.value)


def test_a_billion_laughs_are_cut_short() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 10):
        text += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n"
    with pytest.raises(ManifestError, match="aliases"):
        load_documents(text)


def test_anchors_and_merges_work() -> None:
    text = "base: &b {uri: x, name: n}\nother: {<<: *b, name: m}\n"
    assert load_documents(text)[0].value["other"] == {"uri": "x", "name": "m"}


def test_every_mistake_has_its_line() -> None:
    text = HEAD + SPEC + "  dpo:\n    beta: high\n  trainig:\n    epochs: 1\n  lora:\n    rank: 0\n"
    with pytest.raises(ManifestError) as caught:
        load_manifests(text)
    assert [(f.line, f.field) for f in caught.value.findings] == [
        (8, "spec.dpo.beta"),
        (9, "spec.trainig"),
        (12, "spec.lora.rank"),
    ]


def test_a_missing_field_is_told_at_what_it_is_missing_from() -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifests(HEAD + "spec:\n  data: {train: [{uri: y}]}\n")
    (finding,) = caught.value.findings
    assert (finding.field, finding.line, finding.message) == ("spec.model", 4, "must be set")


def test_several_documents_and_other_kinds() -> None:
    secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\n"
    two = HEAD + SPEC + secret + "---\n" + (HEAD + SPEC).replace("name: a", "name: b") + "---\n"
    assert [j.metadata.name for j in load_manifests(two)] == ["a", "b"]
    with pytest.raises(ManifestError, match=r"holds 2 DPOJobs \(a, b\) where one is expected"):
        load_manifest(two)


def test_mistakes_of_several_documents_are_told_together() -> None:
    bad = HEAD + SPEC + "  x: 1\n---\n" + HEAD + SPEC + "  y: 1\n"
    with pytest.raises(ManifestError) as caught:
        load_manifests(bad)
    assert [f.field for f in caught.value.findings] == ["spec.x", "spec.y"]
    assert [f.line for f in caught.value.findings] == [7, 15]


def test_a_list_as_kubectl_prints_it() -> None:
    items = [manifest({"metadata.name": name}) for name in ("a", "b")]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    assert [j.metadata.name for j in load_manifests(text)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n", "it is empty"),
        ("# nothing\n", "it is empty"),
        ("apiVersion: v1\nkind: Secret\n", "it holds Secret"),
        (
            "kind: DPOjob\napiVersion: dpo-operator.dev/v1alpha1\n",
            '"DPOjob" must be DPOJob',
        ),
        ("- a\n- b\n", "is not a mapping"),
        ("just text\n", "is not a mapping"),
    ],
)
def test_files_without_a_job(text: str, says: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifests(text)
    assert any(says in finding.message for finding in caught.value.findings)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        load_manifests(tmp_path / "absent.yaml")
    with pytest.raises(NotFoundError, match="is a folder"):
        load_manifests(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="is not UTF-8"):
        load_manifests(tmp_path / "binary")
    (tmp_path / "nul").write_bytes(b"a: \x00\n")
    with pytest.raises(ManifestError, match="special characters"):
        load_manifests(tmp_path / "nul")
    (tmp_path / "big").write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(ManifestError, match="larger than 1 MiB"):
        load_manifests(tmp_path / "big")


def test_what_the_api_server_adds_is_ignored() -> None:
    stored = manifest(
        {
            "metadata.uid": "1-2",
            "metadata.generation": 3,
            "metadata.creationTimestamp": "2024-01-01T00:00:00Z",
            "metadata.managedFields": [{"manager": "kubectl"}],
            "metadata.resourceVersion": "7",
            "status": {"state": "Running"},
        }
    )
    read = parse_job(stored)
    assert (read.metadata.uid, read.metadata.generation) == ("1-2", 3)
    assert "status" not in read.to_dict()


def test_null_means_not_set() -> None:
    assert job({"spec.lora": None, "spec.training": {"maxSteps": None, "epochs": None}}).spec == (
        job({"spec.training": {}}).spec
    )
    assert job({"spec.training.epochs": None}).spec.training.epochs == 1


def test_a_job_written_and_read_is_the_same_and_unset_fields_stay_out() -> None:
    read = job({"spec.training": {"learningRate": 9e-7, "validationInterval": "10%"}, "spec.checkpoint.async": False})
    again = load_manifest(read.to_json())
    assert again == read
    assert again.to_dict() == read.to_dict()
    assert read.to_dict()["spec"]["training"] == {"learningRate": 9e-7, "validationInterval": "10%"}
    assert read.to_dict()["spec"]["checkpoint"]["async"] is False
    assert job().to_dict() == MINIMAL


def test_a_parsed_job_cannot_be_changed() -> None:
    read = job()
    with pytest.raises(Exception, match="frozen"):
        read.spec.dpo.beta = 3.0  # type: ignore[misc]
