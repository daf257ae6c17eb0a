from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_cli.__main__ import run
from dpo_testing.cli import Dpo, Replay, Said, World, make_replay, make_world
from dpo_testing.s3server import S3Server, ToolMissingError, s3_server


@pytest.fixture
def dpo(capfd: pytest.CaptureFixture[str]) -> Dpo:
    """Run `dpo` in this process."""

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        code = run(arguments)
        captured = capfd.readouterr()
        said = Said(code, captured.out, captured.err)
        assert "Traceback" not in said.all
        return said

    return call


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


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    try:
        with s3_server() as server:
            yield server
    except ToolMissingError as missing:
        pytest.skip(str(missing))
