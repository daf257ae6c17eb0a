"""Helm, built if Go is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_testing.s3server import ToolMissingError, tool


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder for Helm."""
    try:
        tool("helm")
    except ToolMissingError as error:
        pytest.skip(str(error))
    return tmp_path_factory.mktemp("helm")
