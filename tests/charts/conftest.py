"""Helm, built if Go is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_testing.s3server import need


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder for Helm."""
    need("helm")
    return tmp_path_factory.mktemp("helm")
