"""For every test: the same examples each time, its own cache, and none of the user's credentials."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Examples are fixed, so that everyone sees the same failures; to draw new ones, edit a property.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Triton's interpreter runs the kernels on the CPU. It must be chosen before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

TOOL_FIXTURES = {"s3", "server", "servers", "home", "tools", "cluster"}
"""Fixtures that run a program of hack/tools: a test that uses one is marked ``tools`` (`make check` leaves it out)."""


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TOOL_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.tools)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indices and reference tables of a test run never meet the user's, nor another run's."""
    folder: Path = tmp_path_factory.mktemp("dpo-cache")
    os.environ["DPO_CACHE_DIR"] = str(folder)
