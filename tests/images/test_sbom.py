"""The bills of materials: valid, complete for what the image installs, and nothing of this machine in them.

Making the lists takes most of a minute, and only a release needs them: their tests are nightly.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sbom")]  # one group: the lists are made once

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sbom")
    run = [sys.executable, str(ROOT / "hack/sbom.py")]
    subprocess.run(run, check=True, capture_output=True, env={**os.environ, "SBOM_DIR": str(made)})
    return made


def bom(folder: Path, image: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"{image}.cdx.json").read_text()))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("image", "held", "absent"),
    [
        ("operator", {"kopf", "aiohttp", "pydantic-core", "yarl"}, {"torch", "boto3", "rich", "kubernetes", "pytest"}),
        (
            "trainer",
            {"megatron-core", "boto3", "wandb", "mlflow-skinny"},
            {"torch", "numpy", "triton", "kopf", "kubernetes", "pytest"},
        ),
        (
            "trainer-cpu",
            {"torch", "megatron-core", "boto3", "numpy", "wandb", "mlflow-skinny"},
            {"kopf", "kubernetes", "pytest"},
        ),
    ],
)
def test_it_lists_what_the_image_installs(folder: Path, image: str, held: set[str], absent: set[str]) -> None:
    names = {part["name"].lower().replace("_", "-") for part in bom(folder, image)["components"]}
    assert held <= names
    assert not absent & names


@pytest.mark.nightly
@pytest.mark.parametrize("image", ["operator", "trainer", "trainer-cpu"])
def test_every_version_is_the_pinned_one(folder: Path, image: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for part in bom(folder, image)["components"]:
        name = part["name"].lower().replace("_", "-").replace(".", "-")
        assert part["version"].split("+")[0] == pins[name], name


@pytest.mark.nightly
@pytest.mark.parametrize("image", ["operator", "trainer", "trainer-cpu"])
def test_the_graph_is_whole_and_tells_no_path(folder: Path, image: str) -> None:
    found = bom(folder, image)
    refs = {part["bom-ref"] for part in found["components"]} | {found["metadata"]["component"]["bom-ref"]}
    edges = {edge["ref"]: edge.get("dependsOn", []) for edge in found["dependencies"]}
    assert set(edges) == refs
    assert {ref for below in edges.values() for ref in below} <= refs
    assert found["metadata"]["component"]["name"] == f"dpo-{image}"
    assert str(ROOT) not in json.dumps(found)


def test_an_image_as_built_is_listed_from_its_own_inventory(tmp_path: Path) -> None:
    """Here this machine is the image: its Python packages and, on Debian, its system's."""
    script = (ROOT / "hack/image/inventory.py").read_text()
    run = [sys.executable, "-"]
    inventory = subprocess.run(run, input=script, check=True, capture_output=True, text=True).stdout
    (tmp_path / "dpo-operator.json").write_text(inventory)
    run = [sys.executable, str(ROOT / "hack/sbom.py"), "--inventory", str(tmp_path / "dpo-operator.json")]
    subprocess.run(run, check=True, capture_output=True)
    found = json.loads((tmp_path / "dpo-operator.cdx.json").read_text())
    assert found["metadata"]["component"]["name"] == "dpo-operator"
    parts = {part["purl"]: part["version"] for part in found["components"]}
    assert parts[f"pkg:pypi/pyyaml@{metadata.version('pyyaml')}"] == metadata.version("pyyaml")
    assert sum(purl.startswith("pkg:deb/") for purl in parts) == len(json.loads(inventory)["system"])
    (edge,) = [edge for edge in found["dependencies"] if edge["ref"] == found["metadata"]["component"]["bom-ref"]]
    assert set(edge["dependsOn"]) == {part["bom-ref"] for part in found["components"]}


def test_packages_of_the_system_are_read_as_dpkg_writes_them(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(
        "Package: zlib1g\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1:1.3\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    found = importlib.util.spec_from_file_location("inventory", ROOT / "hack/image/inventory.py")
    assert found is not None
    assert found.loader is not None
    inventory = importlib.util.module_from_spec(found)
    found.loader.exec_module(inventory)
    assert inventory.system_packages(tmp_path) == [{"package": "zlib1g", "version": "1:1.3", "architecture": "amd64"}]
    assert inventory.system_packages(tmp_path / "none") == []
