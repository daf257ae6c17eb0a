"""The store against a real S3 server."""

from __future__ import annotations

import gzip
import os
import random
import socket
import threading
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dpo_api.errors import (
    AccessDeniedError,
    InvalidDataError,
    InvalidSpecError,
    NotFoundError,
    StorageUnavailableError,
)
from dpo_store import ObjectChangedError, RetryPolicy, StorageOptions, Store, open_store
from dpo_store.errors import BadCredentialsError
from dpo_store.multipart import PART
from dpo_store.trees import _safe_name
from dpo_testing.faults import Pauses
from dpo_testing.s3server import S3Server, s3_server


def fill(store: Store, bucket: str, *keys: str) -> None:
    for key in keys:
        store.write(f"s3://{bucket}/{key}", key.encode())


def test_bytes_come_back_as_they_were_written(store: Store, bucket: str) -> None:
    uri = f"s3://{bucket}/folder/ü +&?=#%.bin"
    data = random.Random(0).randbytes(100_000)
    store.write(uri, data)
    info = store.stat(uri)
    assert (info.uri, info.size) == (uri, len(data))
    assert store.read(uri) == data
    assert store.read(uri, 10, 5) == data[10:15]
    assert store.read(uri, len(data) - 3, 100) == data[-3:]
    assert store.read(uri, len(data), 1) == b""
    assert b"".join(store.stream(info, ahead=7_777)) == data
    assert b"".join(store.stream(info, ahead=0, start=50_001)) == data[50_001:]
    assert store.exists(uri)
    store.delete(uri)
    store.delete(uri)
    assert not store.exists(uri)


def test_an_empty_object_is_an_object(store: Store, bucket: str) -> None:
    store.write(f"s3://{bucket}/empty", b"")
    assert store.read(f"s3://{bucket}/empty") == b""
    assert list(store.stream(f"s3://{bucket}/empty")) == []
    assert list(store.lines(f"s3://{bucket}/empty")) == []


def test_patterns_and_folders_stand_for_their_objects_in_order(store: Store, bucket: str) -> None:
    keys = ["t/b.jsonl", "t/a.jsonl", "t/a.jsonl.gz", "t/deep/c.jsonl", "t/deep/er/d.jsonl", "t2/e.jsonl", "ü.jsonl"]
    fill(store, bucket, *keys)
    # A console draws a folder as a key that ends in "/".
    store.write(f"s3://{bucket}/t/drawn/", b"")

    def found(pattern: str) -> list[str]:
        return [info.uri.removeprefix(f"s3://{bucket}/") for info in store.expand(f"s3://{bucket}/{pattern}")]

    assert found("t/") == ["t/a.jsonl", "t/a.jsonl.gz", "t/b.jsonl", "t/deep/c.jsonl", "t/deep/er/d.jsonl"]
    assert found("t/*.jsonl") == ["t/a.jsonl", "t/b.jsonl"]
    assert found("t/*.jsonl*") == ["t/a.jsonl", "t/a.jsonl.gz", "t/b.jsonl"]
    assert found("t/**.jsonl") == ["t/a.jsonl", "t/b.jsonl", "t/deep/c.jsonl", "t/deep/er/d.jsonl"]
    assert found("t/**/c.jsonl") == ["t/deep/c.jsonl"]
    assert found("**/a.jsonl") == ["t/a.jsonl"]
    assert found("t*/?.jsonl") == ["t/a.jsonl", "t/b.jsonl", "t2/e.jsonl"]
    assert found("*.jsonl") == ["ü.jsonl"]
    assert found("t/a.jsonl") == ["t/a.jsonl"]
    assert len(found("")) == len(keys)
    assert store.children(f"s3://{bucket}") == ["t/", "t2/", "ü.jsonl"]
    assert store.children(f"s3://{bucket}/t/deep") == ["c.jsonl", "er/"]
    assert store.children(f"s3://{bucket}/nothing") == []
    assert list(store.list(f"s3://{bucket}/nothing")) == []
    assert store.exists(f"s3://{bucket}/t/deep/")
    assert not store.exists(f"s3://{bucket}/t/dee/")


def test_listings_of_more_than_one_page_are_whole(store: Store, bucket: str, server: S3Server) -> None:
    # S3 answers 1,000 keys at a time. Files by hand are objects of this server.
    folder = server.folder / bucket / "many"
    folder.mkdir()
    for n in range(2050):
        (folder / f"{n:05}").touch()
    uris = [info.uri for info in store.list(f"s3://{bucket}/many")]
    assert uris == [f"s3://{bucket}/many/{n:05}" for n in range(2050)]
    assert store.children(f"s3://{bucket}/many/") == [f"{n:05}" for n in range(2050)]
    assert len(store.expand(f"s3://{bucket}/many/*5")) == 205


def test_a_missing_name_suggests_the_nearest(store: Store, bucket: str) -> None:
    fill(store, bucket, "train/a.jsonl", "train/b.jsonl", "valid.jsonl.gz")

    def told(tail: str) -> str:
        with pytest.raises(NotFoundError) as caught:
            store.expand(f"s3://{bucket}/{tail}")
        return str(caught.value).replace(f"s3://{bucket}/", "B/")

    assert told("trian/") == "B/trian/: nothing found; did you mean B/train/ (2 objects)?"
    assert told("train") == "B/train: does not exist; did you mean B/train/ (2 objects)?"
    assert told("valid.jsonl") == "B/valid.jsonl: does not exist; did you mean B/valid.jsonl.gz?"
    assert told("valid.jsonl.gz/") == "B/valid.jsonl.gz/: nothing found; did you mean B/valid.jsonl.gz?"
    assert told("tran/x/*.jsonl") == "B/tran/x/*.jsonl: nothing found; did you mean B/train/ (2 objects)?"
    assert (
        told("train/*.json") == "B/train/*.json: no object matches '*.json'; B/train/ holds 2 objects, the first is "
        "'a.jsonl'"
    )
    assert told("zzz") == "B/zzz: does not exist"
    with pytest.raises(NotFoundError, match=rf"bucket '{bucket}x' does not exist; did you mean s3://{bucket}/\?"):
        store.expand(f"s3://{bucket}x/train/")
    with pytest.raises(NotFoundError, match=rf"bucket '{bucket}x' does not exist"):
        store.expand(f"s3://{bucket}x/train/a.jsonl")
    with pytest.raises(NotFoundError, match=rf"s3://{bucket}x/a: the bucket does not exist"):
        store.write(f"s3://{bucket}x/a", b"")


def test_lines_of_many_compressed_objects(store: Store, bucket: str) -> None:
    store.write(f"s3://{bucket}/t/1.jsonl", b"1\n2\n")
    store.write(f"s3://{bucket}/t/2.jsonl.gz", gzip.compress(b"3\n") + gzip.compress(b"4"))
    got = [(n, line) for info in store.expand(f"s3://{bucket}/t/*") for n, line in store.lines(info)]
    assert got == [(1, b"1"), (2, b"2"), (1, b"3"), (2, b"4")]
    store.write(f"s3://{bucket}/cut.gz", gzip.compress(b"3\n" * 99)[:-9])
    with pytest.raises(InvalidDataError, match=f"s3://{bucket}/cut.gz: truncated"):
        list(store.lines(f"s3://{bucket}/cut.gz"))


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART + 5])
def test_a_file_goes_up_and_comes_down(store: Store, bucket: str, tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "up").write_bytes(data)
    store.upload(tmp_path / "up", f"s3://{bucket}/x/file")
    assert store.stat(f"s3://{bucket}/x/file").size == size
    store.download(f"s3://{bucket}/x/file", tmp_path / "new" / "folder" / "down")
    assert (tmp_path / "new" / "folder" / "down").read_bytes() == data
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["down"]


def test_a_stream_becomes_an_object_when_it_is_complete(store: Store, bucket: str) -> None:
    """Blocks of any size, in parts of 16 MiB; an empty one; and one that is shorter than announced."""
    data = os.urandom(37 * 1024 * 1024 + 5)
    cuts = [0, 1, 16 * 1024 * 1024, 16 * 1024 * 1024 + 3, 36 * 1024 * 1024, len(data)]
    blocks = [data[first:last] for first, last in pairwise(cuts)]
    store.write_blocks(f"s3://{bucket}/stream", iter(blocks), len(data))
    assert store.read(f"s3://{bucket}/stream") == data
    store.write_blocks(f"s3://{bucket}/empty", iter([]), 0)
    assert store.read(f"s3://{bucket}/empty") == b""
    with pytest.raises(RuntimeError, match=r"38,797,317 bytes came, not 38,797,318"):
        store.write_blocks(f"s3://{bucket}/short", iter(blocks), len(data) + 1)
    assert not store.exists(f"s3://{bucket}/short")


def test_a_folder_goes_up_comes_down_and_goes(store: Store, bucket: str, tmp_path: Path) -> None:
    names = ["a", "b/c", "b/d/e", "b/.hidden"]
    for name in names:
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_text(name)
    fill(store, bucket, "run-2/stays")
    assert store.upload_tree(tmp_path / "up", f"s3://{bucket}/run") == sorted(names)
    assert store.download_tree(f"s3://{bucket}/run", tmp_path / "down") == sorted(names)
    assert {p.relative_to(tmp_path / "down").as_posix(): p.read_text() for p in (tmp_path / "down").rglob("*")
            if p.is_file()} == {name: name for name in names}  # fmt: skip
    store.delete_tree(f"s3://{bucket}/run")
    store.delete_tree(f"s3://{bucket}/run")
    assert [info.uri for info in store.list(f"s3://{bucket}")] == [f"s3://{bucket}/run-2/stays"]
    with pytest.raises(NotFoundError, match="did you mean"):
        store.download_tree(f"s3://{bucket}/run", tmp_path / "down")


def test_an_object_that_changes_between_listing_and_reading_is_an_error(store: Store, bucket: str) -> None:
    uri = f"s3://{bucket}/t.jsonl"
    store.write(uri, b"old\n" * 1000)
    info = store.stat(uri)
    for new in (b"new\n" * 1000, b"short\n"):
        store.write(uri, new)
        with pytest.raises(ObjectChangedError, match=r"t\.jsonl: changed while it was being read"):
            list(store.stream(info))
        with pytest.raises(ObjectChangedError):
            store.read(info, 0, 3)
    store.delete(uri)
    with pytest.raises(NotFoundError):
        list(store.stream(info))


def test_threads_share_a_store(store: Store, bucket: str) -> None:
    fill(store, bucket, *(f"k{n}" for n in range(16)))
    fresh = open_store(store.options)
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda n=n: got.append(fresh.read(f"s3://{bucket}/k{n}"))) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(f"k{n}".encode() for n in range(16))


@pytest.mark.parametrize("tail", ["a", "folder/", "*.jsonl"])
def test_wrong_credentials_are_named_as_such(
    server: S3Server, store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    store.write(f"s3://{bucket}/a", b"x")
    wrong = "wrong-" + server.secret_key
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
    with pytest.raises(BadCredentialsError, match="the secret key is wrong") as caught:
        open_store(server.options()).expand(f"s3://{bucket}/{tail}")
    assert wrong not in str(caught.value)
    assert server.access_key not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKUNKNOWN")
    with pytest.raises(BadCredentialsError, match="does not know this access key"):
        open_store(server.options()).expand(f"s3://{bucket}/{tail}")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match="half of the S3 credentials"):
        open_store(server.options()).expand(f"s3://{bucket}/{tail}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(AccessDeniedError, match="no S3 credentials found; set AWS_ACCESS_KEY_ID"):
        open_store(server.options()).expand(f"s3://{bucket}/{tail}")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessDeniedError, match="AWS_PROFILE names a profile"):
        open_store(server.options()).expand(f"s3://{bucket}/{tail}")


@pytest.mark.parametrize("tail", ["a", "", "*"])
def test_a_wrong_region_is_corrected_by_the_server(server: S3Server, store: Store, bucket: str, tail: str) -> None:
    fill(store, bucket, "a")
    elsewhere = open_store(StorageOptions(endpoint=server.endpoint, region="eu-central-1"))
    assert [info.size for info in elsewhere.expand(f"s3://{bucket}/{tail}")] == [1]


def test_nobody_at_the_endpoint(credentials: None) -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        store = open_store(
            StorageOptions(endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}"),
            retry=RetryPolicy(attempts=3, base=0.001),
        )
        with pytest.raises(StorageUnavailableError, match=r"check storage\.endpoint \(gave up after 3 tries\)"):
            store.expand("s3://bucket/a")


def test_a_missing_ca_bundle_is_named(server: S3Server, credentials: None) -> None:
    store = open_store(StorageOptions(endpoint=server.endpoint, ca_bundle="/nowhere/ca.pem"))
    for uri in ("s3://bucket/a", "s3://bucket/*"):
        with pytest.raises(InvalidSpecError, match=r"storage\.caBundle: /nowhere/ca\.pem"):
            store.expand(uri)


def certificate_of_loopback(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dpo-test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "tls.crt").write_bytes(certificate.public_bytes(pem))
    (folder / "tls.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "tls.crt", folder / "tls.key"


def test_a_private_authority_needs_its_bundle(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: Pauses
) -> None:
    certificate = certificate_of_loopback(tmp_path)
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    with s3_server(certificate) as secure:
        for name, value in secure.environment().items():
            monkeypatch.setenv(name, value)
        stranger = open_store(StorageOptions(endpoint=secure.endpoint), timing=pauses.timing())
        with pytest.raises(StorageUnavailableError, match=r"certificate is not trusted; set storage\.caBundle"):
            stranger.stat("s3://bucket/a")
        assert pauses.taken == []
        friend = open_store(StorageOptions(endpoint=secure.endpoint, ca_bundle=str(certificate[0])))
        with pytest.raises(NotFoundError, match="bucket 'bucket' does not exist"):
            friend.expand("s3://bucket/a")


def test_a_key_that_leads_out_of_the_folder_is_refused(store: Store, bucket: str, tmp_path: Path) -> None:
    for key in ("../evil", "a/../../evil", "/etc/passwd", "a//b", "a\0b"):
        with pytest.raises(InvalidDataError, match="cannot be a file's name"):
            _safe_name(f"s3://b/run/{key}", "s3://b/run/")
    assert _safe_name("s3://b/run/a/b..c", "s3://b/run/") == "a/b..c"
