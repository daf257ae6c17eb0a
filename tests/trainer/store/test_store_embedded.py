"""The quickstart's S3 server: the store finds in it what it finds in a real one."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_api.errors import NotFoundError, PortInUseError
from dpo_store import ObjectChangedError, open_store
from dpo_store.embedded import embedded_s3, environment

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = random.Random(1).randbytes(3_000_000)


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}/crds:{REPOSITORY}/trainer")


@pytest.fixture
def endpoint(path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "a.bin").write_bytes(DATA)
    (tmp_path / "data" / "t.jsonl").write_bytes(b"1\n2\n")
    with embedded_s3("quick", tmp_path / "data") as endpoint:
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        yield endpoint


def test_a_folder_is_served_and_can_be_written(endpoint: str, tmp_path: Path) -> None:
    store = open_store()
    assert [(i.uri, i.size) for i in store.expand("s3://quick/")] == [
        ("s3://quick/deep/a.bin", len(DATA)),
        ("s3://quick/t.jsonl", 4),
    ]
    assert b"".join(store.stream("s3://quick/deep/a.bin", ahead=700_001)) == DATA
    assert store.read("s3://quick/deep/a.bin", 5, 7) == DATA[5:12]
    assert list(store.lines("s3://quick/t.jsonl")) == [(1, b"1"), (2, b"2")]
    (tmp_path / "big").write_bytes(DATA * 7)  # goes up in parts
    store.upload(tmp_path / "big", "s3://quick/run/big")
    store.download("s3://quick/run/big", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == DATA * 7
    info = store.stat("s3://quick/t.jsonl")
    store.write("s3://quick/t.jsonl", b"3\n4\n")
    with pytest.raises(ObjectChangedError):
        list(store.stream(info))
    store.delete_tree("s3://quick/run/")
    with pytest.raises(NotFoundError, match=r"did you mean s3://quick/t\.jsonl"):
        store.expand("s3://quick/t.json")
    with pytest.raises(NotFoundError, match="bucket 'quikc' does not exist"):
        store.expand("s3://quikc/")


def test_a_command_runs_beside_the_server_and_its_exit_code_counts(path: None, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"hello")
    code = "import dpo_store; raise SystemExit(dpo_store.open_store().stat('s3://quick/t').size)"
    server = [sys.executable, "-m", "dpo_store.embedded", "--bucket", "quick", "--folder", str(tmp_path)]
    assert subprocess.run([*server, "--", sys.executable, "-c", code], check=False).returncode == 5


def test_a_taken_port_and_a_missing_folder_are_named(path: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUseError), embedded_s3("quick", port=taken.getsockname()[1]):
            pass
    done = subprocess.run(
        [sys.executable, "-m", "dpo_store.embedded", "--bucket", "quick", "--folder", "/nowhere"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert (done.returncode, done.stderr) == (11, "error: --folder: /nowhere is not a folder\n")
