"""Pushes to a small local server that speaks the hub's calls, by huggingface_hub itself."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_api.errors import AccessDeniedError, InvalidModelError, StorageUnavailableError
from dpo_store import Store, open_store
from dpo_store.push import Branch
from dpo_testing.faults import Pauses
from dpo_testing.hubserver import Failure, HubServer, signed_in

DRAW = random.Random(5)
SHARDS = {f"model-0000{n}-of-00002.safetensors": DRAW.randbytes(30_000) for n in (1, 2)}
FILES = {**SHARDS, "README.md": b"---\ntags: [x]\n---\n", "config.json": b"{}", "empty": b""}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with signed_in(tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    for name, data in FILES.items():
        (made / name).write_bytes(data)
    return made


def branch(name: str = "org/model", revision: str = "main") -> Branch:
    return Branch(name, revision, timing=Pauses().timing())


def push(
    folder: Path,
    to: Branch | None = None,
    store: Store | None = None,
    is_stale: Callable[[str], bool] = lambda _: False,
) -> str:
    store = store or open_store()
    files = {Path(info.uri).name: info for info in store.list(str(folder))}
    return (to or branch()).push(files, store, title="step 3", is_stale=is_stale, progress=lambda *_: None)


def stored(hub: HubServer, repository: str = "org/model", revision: str = "main") -> dict[str, bytes]:
    found = hub.files(repository, revision)
    return {path: data for path, data in found.items() if path != ".gitattributes"}


@pytest.mark.parametrize("part", [None, 12_000])
def test_a_folder_of_shards_becomes_one_commit(hub: HubServer, folder: Path, part: int | None) -> None:
    hub.part_bytes = part
    branch().create(private=True)
    commit = push(folder)
    assert stored(hub) == FILES
    assert hub.branches["org/model", "main"] == commit
    assert hub.titles == ["step 3"]
    assert hub.private == {"org/model": True}
    assert len(hub.uploads()) == (2 if part is None else 6), "the shards are sent by Git LFS, in parts"


def test_what_the_branch_holds_makes_no_commit(hub: HubServer, folder: Path) -> None:
    branch().create(private=False)
    first = push(folder)
    hub.seen.clear()
    branch().create(private=True)
    assert push(folder) == first
    assert (hub.titles, hub.uploads(), hub.private) == (["step 3"], [], {"org/model": False})
    (folder / "config.json").write_bytes(b"[]")
    assert push(folder) != first
    assert len(hub.titles) == 2
    assert hub.uploads() == [], "the hub has the shards"


def test_another_branch_is_created(hub: HubServer, folder: Path) -> None:
    hub.push("org/model", {"kept": b"1", "model.safetensors": b"old", "adapter/x": b"2"})
    to = branch(revision="v2")
    to.create(private=True)
    to.create(private=True)
    push(folder, to, is_stale=lambda path: path.startswith("model"))
    assert stored(hub, revision="v2") == {**FILES, "kept": b"1", "adapter/x": b"2"}, "a stale file goes, others stay"
    assert stored(hub) == {"kept": b"1", "model.safetensors": b"old", "adapter/x": b"2"}


def test_a_push_that_broke_off_goes_on_with_the_file_it_had_reached(hub: HubServer, folder: Path) -> None:
    branch().create(private=True)
    hub.failures = [Failure("PUT /lfs/", 503, times=1000, skip=1)]
    with pytest.raises(StorageUnavailableError, match=r"hf://org/model@main/model-00002.*gave up after 12 tries"):
        push(folder)
    assert hub.titles == []
    assert list(hub.objects.values()) == [SHARDS["model-00001-of-00002.safetensors"]]
    hub.failures.clear()
    hub.seen.clear()
    push(folder)
    assert len(hub.uploads()) == 1, "the first shard is not sent again"
    assert stored(hub) == FILES


def test_objects_are_sent_from_s3(
    hub: HubServer, store: Store, bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dpo_store.push._IN_MEMORY", 1000)  # the shards are copied to files
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store.upload_tree(folder, f"s3://{bucket}/model")
    branch().create(private=True)
    most = []

    def progress(_: int, path: str) -> None:
        most.append(sum(copy.stat().st_size for copy in tmp_path.glob("dpo-push-*/*")))

    files = {Path(info.uri).name: info for info in store.list(f"s3://{bucket}/model")}
    branch().push(files, store, title="step 3", is_stale=lambda _: False, progress=progress)
    assert stored(hub) == FILES
    assert most == [0] * len(FILES), "one copy at a time"


@pytest.mark.parametrize("code", [503, 0])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: HubServer, folder: Path, code: int) -> None:
    branch().create(private=True)
    hub.failures = [Failure("/commit/", code, acts=True)]
    assert push(folder) == hub.branches["org/model", "main"]
    assert hub.titles == ["step 3"]


def test_a_commit_of_somebody_else_in_between_is_looked_at(hub: HubServer, folder: Path) -> None:
    branch().create(private=True)
    other = hub.push

    def between(path: str) -> bool:  # asked before the commit, with the branch's files
        if path == ".gitattributes" and "other" not in hub.files("org/model"):
            other("org/model", {**hub.files("org/model"), "other": b"1", "model.safetensors": b"stale"})
        return path == "model.safetensors"

    push(folder, is_stale=between)
    assert stored(hub) == {**FILES, "other": b"1"}


@pytest.mark.parametrize("call", ["/preupload/", "PUT /lfs/", "/commit/"])
def test_a_hub_that_stops_answering_is_not_waited_for_for_ever(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from huggingface_hub import close_session

    monkeypatch.setattr("dpo_store.hub.SILENCE_SECONDS", 0.5)
    close_session()  # the next request makes a client
    branch().create(private=True)
    ended = threading.Event()
    hub.failures = [Failure(call, 503, until=ended)]
    try:
        push(folder)
    finally:
        ended.set()
        close_session()
    assert stored(hub) == FILES


def test_a_server_without_xet_is_named(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    branch().create(private=True)
    with pytest.raises(
        StorageUnavailableError, match=r"broke the connection: .*404.*/xet-write-token/.*after 12 tries"
    ):
        push(folder)


def test_a_file_that_the_hub_ignores_is_an_error(hub: HubServer, folder: Path) -> None:
    hub.push("org/model", {".gitignore": b"config.json\n"})
    with pytest.raises(StorageUnavailableError, match=r"the hub did not take config\.json .*\.gitignore"):
        push(folder)


def test_a_card_that_the_hub_refuses_is_named(hub: HubServer, folder: Path) -> None:
    branch().create(private=True)
    hub.failures = [Failure("validate-yaml", 400)]
    with pytest.raises(InvalidModelError, match=r"hf://org/model@main: Invalid metadata in README\.md"):
        push(folder)


def test_tokens(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AccessDeniedError, match=r"hf://org/model@main: the hub refuses the token") as caught:
        branch().create(private=True)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessDeniedError, match=r"a push needs an access token, and there is none; set HF_TOKEN"):
        branch().check()
    assert hub.commits == {}


def test_a_token_that_may_not_write_is_refused_before_anything_is_sent(hub: HubServer, folder: Path) -> None:
    assert not branch().check()
    with pytest.raises(AccessDeniedError, match=r"hf://other/model@main: .*account tester is not other or a member"):
        branch("other/model").check()
    hub.push("other/model", {})
    with pytest.raises(AccessDeniedError, match=r"hf://other/model@main: the token may not write to this repository"):
        branch("other/model").create(private=True)
    hub.role = "read"
    with pytest.raises(AccessDeniedError, match=r"hf://org/model@main: the token of tester may only read"):
        branch().create(private=True)
    assert not hub.knows("org/model")
    hub.push("org/model", {})
    with pytest.raises(AccessDeniedError, match="may not write"):
        push(folder)
