"""What `--selfcheck` says of a node, and its exit codes; GPUs are not here, so their checks are met without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_api.version import VERSION
from dpo_testing.s3server import S3Server, ToolMissingError, s3_server
from dpo_trainer import selfcheck as module
from dpo_trainer.entry import main
from dpo_trainer.selfcheck import findings, folder, selfcheck, shared_memory, storage


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    try:
        with s3_server() as running:
            running.make_bucket("models")
            running.client().put_object(Bucket="models", Key="small/config.json", Body=b"{}")
            yield running
    except ToolMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server


def without_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A node without device files, whatever machine this is."""
    monkeypatch.setattr(module, "devices_seen", lambda: 0)
    monkeypatch.setattr(module, "DEVICE_FILES", tmp_path / "dev")
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))


def test_a_laptop_lacks_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_gpu(monkeypatch, tmp_path)
    assert main(["--selfcheck"]) == 0
    said = capsys.readouterr().out
    assert f"dpo-trainer {VERSION}" in said
    assert "Gloo is available" in said
    assert said.splitlines()[-1] == "selfcheck: all is there"
    assert not (tmp_path / "cache").exists(), "a look leaves nothing behind"


def test_gpus_that_are_asked_for_and_absent_are_lacking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_gpu(monkeypatch, tmp_path)
    assert selfcheck(gpus=2) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lacks"))
    assert "0 of 2 GPUs" in line
    assert "/dev/nvidiactl" in line or "built for CPUs only" in line


def test_a_driver_without_a_working_gpu_is_lacking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert [f.topic for f in findings(None, (), None) if f.level == "lacks"] == ["gpu"]


def test_small_shared_memory_is_lacking_only_between_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "SHM_GPU", 1 << 60)
    assert shared_memory(tmp_path, seen=8).level == "lacks"
    assert "--shm-size" in shared_memory(tmp_path, seen=8).text
    assert shared_memory(tmp_path, seen=1).level == "ok"


def test_a_folder_that_cannot_be_written_is_lacking(tmp_path: Path) -> None:
    assert folder("cache", tmp_path / "a/b", "do this").level == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    found = folder("cache", tmp_path / "file/cache", "set DPO_CACHE_DIR")
    assert found.level == "lacks"
    assert "set DPO_CACHE_DIR" in found.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_another_user_is_lacking() -> None:
    assert folder("cache", Path("/proc/1"), "").level == "lacks"


def test_an_object_and_a_folder_in_s3_are_reached(credentials: S3Server) -> None:
    assert storage("s3://models/small/config.json", None).level == "ok"
    found = storage("s3://models/small/", credentials.endpoint)
    assert (found.level, "1 objects" in found.text) == ("ok", True)


@pytest.mark.parametrize(
    ("uri", "part"),
    [("s3://modles/x", "modles"), ("s3://models/small/confg.json", "did you mean"), ("gs://m/x", "gs://")],
)
def test_a_wrong_address_is_lacking_by_name(credentials: S3Server, uri: str, part: str) -> None:
    found = storage(uri, None)
    assert found.level == "lacks"
    assert part in found.text


def test_wrong_keys_are_lacking(credentials: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "notTheKey")
    found = storage("s3://models/small/config.json", None)
    assert (found.level, found.text.split(":")[0]) == ("lacks", "AccessDenied")
    assert "notTheKey" not in found.text


def test_a_server_that_is_not_there_is_lacking(credentials: S3Server) -> None:
    found = storage("s3://models/small/config.json", "http://127.0.0.1:9")
    assert (found.level, found.text.split(":")[0]) == ("lacks", "StorageUnavailable")


def test_a_failing_check_hides_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, tmp_path)

    def breaks(_seen: int) -> Iterator[module.Finding]:
        raise RuntimeError("ncclSystemError:\n  out of handles")

    monkeypatch.setattr(module, "collectives", breaks)
    found = list(findings(None, (), None))
    assert [f.text for f in found if f.topic == "nccl"] == ["the check failed: ncclSystemError: out of handles"]
    assert {"shm", "cache", "scratch"} <= {f.topic for f in found}


def test_the_version_needs_no_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dpo-trainer {VERSION}\n"
