"""The store on files: the same rules as on S3."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_api.errors import AccessDeniedError, InvalidSpecError, NoSpaceError, NotFoundError
from dpo_store import ObjectChangedError, ObjectInfo, Store, open_store

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def disk() -> Store:
    return open_store()


def test_bytes_come_back_as_they_were_written(disk: Store, tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/a/ü &.bin", f"file://{tmp_path}/b/%C3%BC%20&.bin"):
        data = bytes(range(256)) * 4000
        disk.write(uri, data)
        info = disk.stat(uri)
        assert (info.uri, info.size) == (uri, len(data))
        assert disk.read(uri, 10, 5) == data[10:15]
        assert disk.read(uri, len(data), 5) == b""
        assert b"".join(disk.stream(info)) == data
        assert b"".join(disk.stream(uri, start=999)) == data[999:]
        assert [found.uri for found in disk.list(uri.rpartition("/")[0])] == [uri]
    assert (tmp_path / "b" / "ü &.bin").is_file()


def test_files_are_found_as_objects_are(disk: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("t/b.jsonl", "t/a.jsonl", "t/a/z.jsonl", "t/a-b/y.jsonl", "t/a.jsonl.gz", "v.jsonl"):
        disk.write(f"{tmp_path}/{name}", name.encode())
    (tmp_path / "t" / "loop").symlink_to(tmp_path / "t")
    (tmp_path / "t" / "nowhere").symlink_to(tmp_path / "no")
    # The order of S3's keys: "-" < "." < "/".
    whole = ["t/a-b/y.jsonl", "t/a.jsonl", "t/a.jsonl.gz", "t/a/z.jsonl", "t/b.jsonl"]
    assert [i.uri.removeprefix(f"{tmp_path}/") for i in disk.expand(f"{tmp_path}/t/")] == whole
    monkeypatch.chdir(tmp_path)
    assert [i.uri for i in disk.expand("t/")] == whole
    assert [i.uri for i in disk.expand("./t/*.jsonl")] == ["./t/a.jsonl", "./t/b.jsonl"]
    assert [i.uri for i in disk.expand("*.jsonl")] == ["v.jsonl"]
    assert [i.uri for i in disk.expand("**/z.jsonl")] == ["t/a/z.jsonl"]
    assert disk.children("t") == ["a-b/", "a.jsonl", "a.jsonl.gz", "a/", "b.jsonl", "loop/", "nowhere"]
    assert disk.children("nothing") == []

    def told(uri: str) -> str:
        with pytest.raises(NotFoundError) as caught:
            disk.expand(uri)
        return str(caught.value)

    assert told("t") == "t: does not exist; did you mean t/ (5 objects)?"
    assert told("v.json") == "v.json: does not exist; did you mean v.jsonl?"
    assert told("x/y/*.jsonl") == "x/y/*.jsonl: nothing found"
    assert told("t/*.txt") == "t/*.txt: no object matches '*.txt'; t/ holds 5 objects, the first is 'a-b/y.jsonl'"
    assert told(f"{tmp_path}/tt/") == f"{tmp_path}/tt/: nothing found; did you mean {tmp_path}/t/ (5 objects)?"


def test_errors_have_their_classes(disk: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotFoundError, match="is a folder, not a file"):
        disk.read(str(tmp_path))
    with pytest.raises(NotFoundError, match="does not exist"):
        disk.stat(f"{tmp_path}/no")
    with pytest.raises(NotFoundError, match="a part of its path is a file"):
        disk.read(f"{tmp_path}/file/x")
    with pytest.raises(InvalidSpecError, match="the name is too long"):
        disk.stat(f"{tmp_path}/{'x' * 300}")
    (tmp_path / "file").chmod(0)
    tmp_path.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:  # whom no permission stops: be nobody for a moment
            os.seteuid(65534)
        for forbidden in (disk.read, lambda uri: disk.write(uri, b"x")):
            with pytest.raises(AccessDeniedError, match="permission denied"):
                forbidden(f"{tmp_path}/file")
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o755)


def test_a_file_that_changes_is_an_error(disk: Store, tmp_path: Path) -> None:
    uri = f"{tmp_path}/t"
    disk.write(uri, bytes(1_000_000))
    info = disk.stat(uri)
    reader = disk.stream(info)
    next(reader)
    with Path(uri).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ObjectChangedError, match="changed while it was being read"):
        list(reader)
    os.truncate(uri, 300_000)
    with pytest.raises(ObjectChangedError):
        list(disk.stream(ObjectInfo(uri, 1_000_000)))
    disk.write(uri, bytes(1_000_000))
    with pytest.raises(ObjectChangedError):
        list(disk.stream(info))
    with pytest.raises(ObjectChangedError):
        disk.read(info)


def test_a_reader_sees_the_old_file_or_the_new(disk: Store, tmp_path: Path) -> None:
    uri = f"{tmp_path}/t"
    disk.write(uri, b"old")
    with Path(uri).open("rb") as reader:
        disk.write(uri, b"new")
        assert reader.read() == b"old"
    assert disk.read(uri) == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_folder_is_copied_and_removed(disk: Store, tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        disk.write(f"{tmp_path}/up/{name}", name.encode())
    assert disk.upload_tree(tmp_path / "up", f"{tmp_path}/mid") == ["a", "b/c"]
    assert disk.download_tree(f"{tmp_path}/mid", tmp_path / "down") == ["a", "b/c"]
    assert (tmp_path / "down" / "b" / "c").read_bytes() == b"b/c"
    disk.upload(tmp_path / "down" / "a", f"{tmp_path}/down/a")  # onto itself
    assert disk.read(f"{tmp_path}/down/a") == b"a"
    disk.delete_tree(f"{tmp_path}/mid")
    disk.delete_tree(f"{tmp_path}/mid")
    disk.delete(f"{tmp_path}/up/a")
    disk.delete(f"{tmp_path}/up/a")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "b", "c", "c", "down", "up"]


def test_space_is_checked_before_the_first_byte(disk: Store, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free * 2)  # sparse: takes no space itself
    for copy in (disk.upload, disk.download):
        with pytest.raises(NoSpaceError, match=r"needs .* GiB but has .* GiB free; make room or choose another folder"):
            copy(f"{tmp_path}/huge", f"{tmp_path}/new/copy")
    with pytest.raises(NoSpaceError):
        disk.download_tree(f"{tmp_path}", tmp_path / "tree")
    assert [p.name for p in tmp_path.iterdir()] == ["huge"]


FULL_DISK = """
import sys
from dpo_api.errors import NoSpaceError
from dpo_store import open_store
store = open_store()
store.write(sys.argv[1] + "/x", b"old")
try:
    store.write(sys.argv[1] + "/x", bytes(3_000_000))
except NoSpaceError as error:
    print(error, store.read(sys.argv[1] + "/x"), store.children(sys.argv[1]))
"""


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path: Path) -> None:
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    script = 'mount -t tmpfs -o size=2m tmpfs "$1"; shift; exec "$@"'
    if subprocess.run([*mount, script, "sh", str(tmp_path), "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not allow a mount in a namespace of one's own")
    done = subprocess.run(
        [*mount, script, "sh", str(tmp_path), sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}/crds:{REPOSITORY}/trainer"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path}/x: no space left on the disk b'old' ['x']\n"
