from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_testing.cli import Dpo, Replay, World, in_this_process, make_replay, make_world
from dpo_testing.s3server import S3Server, need, s3_server


@pytest.fixture
def dpo(capfd: pytest.CaptureFixture[str]) -> Dpo:
    """Run `dpo` in this process."""
    return in_this_process(capfd)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    # Rich takes its width and colours from here; a test must not depend on the terminal that runs it.
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "DPO_PVC_ROOT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return make_world(tmp_path)


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    return make_replay(tmp_path / "replay")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    need("versitygw")
    with s3_server() as server:
        yield server
