"""What the modules of whole runs share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A module's folder: its model, its data, its runs."""
    return tmp_path_factory.mktemp(request.path.stem.removeprefix("test_"))
