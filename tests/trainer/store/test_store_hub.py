"""hf:// addresses against a small local server that speaks the hub's calls."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_api.errors import AccessDeniedError, InvalidSpecError, NoSpaceError, NotFoundError, StorageUnavailableError
from dpo_store import StorageOptions, Store, open_store
from dpo_testing.faults import Pauses
from dpo_testing.hubserver import HubServer, hub_server, used_here

DATA = random.Random(3).randbytes(3_000_000)
FILES = {"config.json": b"{}", "big.bin": DATA, "part/a.jsonl": b"1\n2\n", "part/b.jsonl": b"3\n", "empty": b""}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as running:
        used_here(running, tmp_path, monkeypatch)
        running.push("org/model", FILES)
        running.push("datasets/org/pairs", FILES, branch="v1")
        yield running


def store_at(cache: Path | None = None) -> Store:
    return open_store(StorageOptions(hub_cache=None if cache is None else str(cache)), timing=Pauses().timing())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("base", ["hf://org/model", "hf://org/model@main", "hf://datasets/org/pairs@v1"])
def test_a_repository_is_read_as_a_folder(hub: HubServer, tmp_path: Path, base: str, cached: bool) -> None:
    store = store_at(tmp_path / "cache" if cached else None)
    assert [info.size for info in store.expand(f"{base}/part/*.jsonl")] == [4, 2]
    assert store.children(base) == ["big.bin", "config.json", "empty", "part/"]
    assert store.children(f"{base}/part") == ["a.jsonl", "b.jsonl"]
    assert store.read(f"{base}/big.bin") == DATA
    assert store.read(f"{base}/big.bin", 7, 100) == DATA[7:107]
    assert store.read(f"{base}/empty") == b""
    assert b"".join(store.stream(f"{base}/big.bin", start=5)) == DATA[5:]
    assert list(store.lines(f"{base}/part/a.jsonl")) == [(1, b"1"), (2, b"2")]
    assert not store.exists(f"{base}/part/c.jsonl")
    with pytest.raises(NotFoundError, match=r"part/a\.json: does not exist; did you mean .*part/a\.jsonl"):
        store.expand(f"{base}/part/a.json")
    # With a cache one request for the whole file; without one, each read is a request.
    assert len(hub.downloads("big.bin")) == (1 if cached else 3)


def test_a_cached_commit_needs_no_request(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.branches["org/model", "main"]
    info = store_at(tmp_path).stat(f"hf://org/model@{commit}/big.bin")
    assert store_at(tmp_path).read(info, 1, 2) == DATA[1:3]
    hub.seen.clear()
    assert store_at(tmp_path).read(info, 1, 2) == DATA[1:3]
    assert hub.seen == []


def test_a_file_that_does_not_fit_is_not_begun(hub: HubServer, tmp_path: Path) -> None:
    hub.announced["big.bin"] = 10**18
    with pytest.raises(NoSpaceError, match=rf"hf://org/model/big\.bin: {tmp_path} needs .* but has .* free"):
        next(store_at(tmp_path).stream("hf://org/model/big.bin"))
    assert hub.downloads("big.bin") == []


def test_one_store_sees_one_version(hub: HubServer, tmp_path: Path) -> None:
    store = store_at(tmp_path)
    assert store.read("hf://org/model/config.json") == b"{}"
    hub.push("org/model", {**FILES, "config.json": b"[1]", "part/b.jsonl": b"other\n"})
    assert store.read("hf://org/model/part/b.jsonl") == b"3\n"
    assert store_at(tmp_path).read("hf://org/model/part/b.jsonl") == b"other\n"


def test_a_broken_download_resumes_at_the_byte_it_reached(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # it keeps whole chunks, of 10 MB
    hub.cuts = [1_000_000, 500_000]
    assert store_at(tmp_path).read("hf://org/model/big.bin") == DATA
    first, second, third = hub.downloads("big.bin")
    assert first == ""
    assert (second, third) == ("bytes=1000000-", "bytes=1500000-")


def test_a_broken_range_is_asked_for_again(hub: HubServer) -> None:
    hub.cuts = [10]
    assert store_at().read("hf://org/model/big.bin", 0, 100) == DATA[:100]


def test_tokens(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"
    with pytest.raises(NotFoundError, match=r"hf://org/model: no such repository, or it is private and HF_TOKEN"):
        store_at().read("hf://org/model/config.json")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AccessDeniedError, match=r"hf://org/model: the hub refuses the token; check HF_TOKEN") as caught:
        store_at().read("hf://org/model/config.json")
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert store_at().read("hf://org/model/config.json") == b"{}"
    assert store_at(tmp_path / "cache").read("hf://org/model/config.json") == b"{}"
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_right")
    assert store_at().read("hf://org/model/config.json") == b"{}"


def test_what_is_missing_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match=r"hf://org/other: no such repository"):
        store_at().read("hf://org/other/config.json")
    with pytest.raises(NotFoundError, match=r"hf://org/model@v9: the repository has no such revision"):
        store_at().stat("hf://org/model@v9/config.json")
    with pytest.raises(NotFoundError, match=r"hf://org/model/x: does not exist"):
        store_at().read("hf://org/model/x")


def test_a_hub_that_is_not_there_is_tried_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StorageUnavailableError, match=r"the hub cannot be reached.*gave up after 12 tries"):
        store_at().stat("hf://org/model/config.json")


def test_the_hub_is_never_written_to(hub: HubServer, tmp_path: Path) -> None:
    store = store_at()
    (tmp_path / "x").write_bytes(b"x")
    for act in (
        lambda: store.write("hf://org/model/x", b"x"),
        lambda: store.write_blocks("hf://org/model/x", [b"x"], 1),
        lambda: store.upload(tmp_path / "x", "hf://org/model/x"),
        lambda: store.delete("hf://org/model/config.json"),
        lambda: store.delete_tree("hf://org/model/part"),
    ):
        with pytest.raises(InvalidSpecError, match="hf:// can only be read"):
            act()


@pytest.mark.parametrize("uri", ["hf://model", "hf://org/model@", "hf://org/a b", "hf://org/model/../x", "hf://"])
def test_addresses_that_name_no_repository(uri: str) -> None:
    with pytest.raises(InvalidSpecError, match="write hf://org/name@revision"):
        store_at().read(uri)
