from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import InvalidSpecError, NotFoundError
from dpo_api.spec import Storage, StorageAccess
from dpo_store import StorageOptions, base_name, is_remote, join_uri, local_path_of, open_store
from dpo_store.access import options_of
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


COMMON = Storage.model_validate(
    {
        "endpoint": "https://s3.example.com",
        "region": "us-east-1",
        "forcePathStyle": True,
        "credentialsSecretRef": {"name": "common"},
    }
)


def own(**fields: Any) -> StorageAccess:
    return StorageAccess.model_validate(fields)


def test_the_most_specific_storage_section_wins_field_by_field() -> None:
    merged = options_of(COMMON, own(region="eu-west-1", forcePathStyle=False), {})
    assert merged == StorageOptions(endpoint="https://s3.example.com", region="eu-west-1", force_path_style=False)


@pytest.mark.parametrize(
    ("section", "allowed"),
    [
        (None, True),
        (own(region="eu-west-1"), True),
        (own(endpoint="https://S3.Example.com/"), True),
        (own(endpoint="https://s3.example.com", credentialsSecretRef={"name": "writer"}), True),
        (own(endpoint="https://vendor.example.com", credentialsSecretRef={"name": "common"}), True),
        (own(endpoint="https://vendor.example.com"), False),
        (own(endpoint="http://s3.example.com"), False),
        (own(endpoint="https://s3.example.com:8443"), False),
        (own(endpoint="https://s3.example.com/other"), False),
        (own(endpoint="https://vendor.example.com", credentialsSecretRef={"name": "vendor"}), False),
    ],
)
def test_the_common_keys_belong_to_the_common_endpoint(section: StorageAccess | None, allowed: bool) -> None:
    assert options_of(COMMON, section, {}).environment_keys is allowed
    named = section is not None and section.credentials_secret_ref is not None
    assert (COMMON.access(section).credentials_secret_ref is not None) == (allowed or named)


def test_keys_that_no_spec_names_are_the_machines_own() -> None:
    anywhere = own(endpoint="https://vendor.example.com")
    assert options_of(Storage(), anywhere, {}).environment_keys
    assert options_of(Storage(), anywhere, {}).endpoint == "https://vendor.example.com"


def test_certificates_are_the_sources_own_else_the_common_ones() -> None:
    storage = Storage.model_validate({"caBundle": {"path": "/common.pem"}})
    assert options_of(storage, own(region="eu-west-1"), {}).ca_bundle == "/common.pem"
    nearest = own(caBundle={"path": "/own.pem"})
    assert options_of(storage, nearest, {"DPO_CA_BUNDLE": "/env.pem"}).ca_bundle == "/own.pem"
    mounted = own(caBundle={"secretRef": {"name": "ca"}, "key": "tls.pem"})
    assert options_of(storage, mounted, {"DPO_CA_DIR": "/ca"}).ca_bundle == "/ca/secret/ca/tls.pem"
    assert options_of(storage, mounted, {}).ca_bundle == "/common.pem"  # nothing mounts it on one machine
    assert options_of(Storage(), mounted, {"DPO_CA_BUNDLE": "/env.pem"}).ca_bundle == "/env.pem"


def test_an_endpoint_is_a_url_without_credentials() -> None:
    with pytest.raises(InvalidSpecError, match="must not hold credentials") as caught:
        StorageOptions(endpoint="https://user:hunter2@s3.example.com")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InvalidSpecError, match="is not a URL"):
        StorageOptions(endpoint="s3.example.com:9000")
