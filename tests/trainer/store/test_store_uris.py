from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo_api.errors import InvalidSpecError, NotFoundError
from dpo_store import StorageOptions, base_name, is_remote, join_uri, local_path_of, open_store
from dpo_store.uris import parse


@pytest.mark.parametrize(
    "uri", ["s3://bucket/a b/ü*.jsonl", "s3://bucket/", "pvc://claim/x/y", "/abs/x", "rel/x", "file:///a/b%20c", "~/x"]
)
def test_an_address_survives_parsing(uri: str) -> None:
    assert str(parse(uri)) == uri


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("", "empty"),
        ("gs://bucket/x", "gs:// is not supported"),
        ("https://s3.example.com/b/x", "https:// is not supported"),
        ("s3://", "not a bucket"),
        ("s3:///key", "not a bucket"),
        ("s3://under score!/key", "not a bucket"),
        ("file://relative", "three slashes"),
        ("pvc://Claim_1/x", "claim's name"),
        ("pvc://claim/../../etc/passwd", "no '..'"),
    ],
)
def test_a_wrong_address_is_refused_by_name(uri: str, part: str) -> None:
    with pytest.raises(InvalidSpecError, match=part):
        parse(uri)


def test_names_are_joined_with_one_slash() -> None:
    assert join_uri("s3://b/runs", "step-1", "w.bin") == "s3://b/runs/step-1/w.bin"
    assert join_uri("s3://b/runs/", "step-1/", "/w/") == "s3://b/runs/step-1/w/"
    assert join_uri("s3://b", "w") == "s3://b/w"
    assert join_uri("runs", "w") == "runs/w"
    assert join_uri("pvc://claim", "w") == "pvc://claim/w"
    assert base_name("s3://b/x/train.jsonl") == "train.jsonl"
    assert base_name("s3://b/x/") == "x"
    assert base_name("s3://b") == "b"
    assert is_remote("s3://b/x")
    assert not is_remote("pvc://c/x")
    assert local_path_of("s3://b/x") is None
    assert local_path_of("file:///a/b%20c") == Path("/a/b c")


def test_a_claim_is_a_folder_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_bytes(b"{}")
    monkeypatch.setenv("DPO_PVC_ROOT", str(tmp_path))
    store = open_store()
    assert [info.uri for info in store.expand("pvc://models/llama/")] == ["pvc://models/llama/config.json"]
    assert store.read("pvc://models/llama/config.json") == b"{}"
    with pytest.raises(NotFoundError, match="claim 'model' is not mounted"):
        store.read("pvc://model/llama/config.json")
    monkeypatch.delenv("DPO_PVC_ROOT")
    with pytest.raises(NotFoundError, match="set DPO_PVC_ROOT"):
        store.read("pvc://models/llama/config.json")


@dataclass(frozen=True)
class Section:
    endpoint: str | None = None
    region: str | None = None
    force_path_style: bool | None = None


def test_the_most_specific_storage_section_wins_field_by_field() -> None:
    merged = StorageOptions.of(
        Section(region="eu-west-1", force_path_style=False), None, Section("https://s3.example.com", "us-east-1", True)
    )
    assert merged == StorageOptions(endpoint="https://s3.example.com", region="eu-west-1", force_path_style=False)


def test_an_endpoint_is_a_url_without_credentials() -> None:
    with pytest.raises(InvalidSpecError, match="must not hold credentials") as caught:
        StorageOptions(endpoint="https://user:hunter2@s3.example.com")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InvalidSpecError, match="is not a URL"):
        StorageOptions(endpoint="s3.example.com:9000")
