"""Writes build/sbom/<image>.cdx.json: what each image installs on its base, as CycloneDX, from this environment.

With ``--inventory FILE`` it lists all that an image holds, as built, from what hack/image/inventory.py printed in it.
The list has the name of ``FILE`` with the ending ``.cdx.json``. It is the one to publish with an image.

The images are built with the same constraints.txt as this environment, so the versions agree; what an image leaves out,
its list leaves out. What the base image brings is its maker's to list: for the GPU image that is torch, too, and what
belongs to it (``--keep`` in Dockerfile.trainer).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parents[1]


class Image(NamedTuple):
    """What is installed: the base list of pyproject.toml and these extras, as one stage of a Dockerfile says."""

    dockerfile: str
    stage: str
    extras: tuple[str, ...]

    def words(self, flag: str) -> list[str]:
        """Return what the stage that names the requirements gives hack/image/requirements.py after a flag."""
        text = (ROOT / self.dockerfile).read_text().partition(f" AS {self.stage}\n")[2].partition("\nFROM ")[0]
        found = re.search(rf'"{flag}",((?:\s*\\?\s*"[^-"][^"]*",?)+)', text)
        return [] if found is None else re.findall(r'"([^"]+)"', found.group(1))


IMAGES: Final = {
    "operator": Image("Dockerfile.operator", "requirements", ("operator",)),
    "trainer": Image("Dockerfile.trainer", "requirements-gpu", ("trainer", "wandb", "mlflow")),
    "trainer-cpu": Image("Dockerfile.trainer", "requirements-cpu", ("trainer", "wandb", "mlflow")),
}


def closure(requirements: list[Requirement]) -> set[str]:
    """Return the normalised names of what these bring, in this environment, with all that it needs in turn."""
    seen: set[tuple[str, str]] = set()
    queue = [(requirement, "") for requirement in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            queue += [(Requirement(text), wanted) for text in metadata.requires(name) or []]
    return {name for name, _ in seen}


def requirements_of(image: Image) -> list[Requirement]:
    """Return what the image installs, as its Dockerfile says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    unused = {canonicalize_name(name) for name in image.words("--without")}
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in image.extras for line in extras[extra])]
    return [found for found in map(Requirement, lines) if canonicalize_name(found.name) not in unused]


def environment() -> dict[str, Any]:
    """Return this whole environment's bill of materials, as cyclonedx-py writes it."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--output-reproducible", "--short-PURLs", sys.executable]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(found))


def cut(bom: dict[str, Any], names: set[str], direct: set[str], image: str) -> dict[str, Any]:
    """Return the part of ``bom`` that ``names`` are, below a root that is the image."""
    kept = [part for part in bom["components"] if canonicalize_name(part["name"]) in names]
    refs = {part["bom-ref"] for part in kept}
    root = {**bom["metadata"]["component"], "name": f"dpo-{image}"}
    root.pop("purl", None)
    tops = sorted(part["bom-ref"] for part in kept if canonicalize_name(part["name"]) in direct)
    edges = [{"ref": root["bom-ref"], "dependsOn": tops}]
    for edge in bom["dependencies"]:
        if edge["ref"] in refs:
            below = [ref for ref in edge.get("dependsOn", []) if ref in refs]
            edges.append({"ref": edge["ref"]} | ({"dependsOn": below} if below else {}))
    return {**bom, "metadata": {**bom["metadata"], "component": root}, "components": kept, "dependencies": edges}


def validate(text: str) -> None:
    """Raise ValueError unless ``text`` is CycloneDX 1.6."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise ValueError(f"not CycloneDX 1.6: {wrong}")


def as_built(inventory: dict[str, Any], image: str) -> str:
    """Return the bill of materials of an image from its own inventory."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from packageurl import PackageURL

    bom = Bom()
    root = Component(name=image, type=ComponentType.CONTAINER, bom_ref=image)
    bom.metadata.component = root
    parts = [
        Component(
            name=each["name"],
            version=each["version"],
            purl=(purl := PackageURL("pypi", None, each["name"], each["version"])),
            bom_ref=str(purl),
        )
        for each in inventory["python"]
    ]
    parts += [
        Component(
            name=each["package"],
            version=each["version"],
            purl=(
                purl := PackageURL(
                    "deb",
                    inventory["distribution"],
                    each["package"],
                    each["version"],
                    qualifiers={"arch": each["architecture"]},
                )
            ),
            bom_ref=str(purl),
        )
        for each in inventory["system"]
    ]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(root, parts)
    text: str = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)
    return text + "\n"


def write_as_built(file: Path) -> int:
    """Write the list of an image beside its inventory; return the exit code."""
    text = as_built(json.loads(file.read_text()), file.stem)
    validate(text)
    path = file.with_suffix(".cdx.json")
    path.write_text(text)
    print(f"{path}: {len(json.loads(text)['components'])} components")
    return 0


def main() -> int:
    """Write a file an image; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the bills of materials of the images.")
    parser.add_argument("--inventory", type=Path, help="what hack/image/inventory.py printed in an image")
    inventory = parser.parse_args().inventory
    if inventory is not None:
        return write_as_built(inventory)
    folder = Path(os.environ.get("SBOM_DIR", ROOT / "build" / "sbom"))
    folder.mkdir(parents=True, exist_ok=True)
    whole = environment()
    for name, image in IMAGES.items():
        requirements = requirements_of(image)
        direct: set[str] = {canonicalize_name(requirement.name) for requirement in requirements}
        kept = image.words("--keep")
        ours = {each for each in closure(requirements) if not any(fnmatch(each, pattern) for pattern in kept)}
        bom = cut(whole, ours, direct, name)
        text = json.dumps(bom, indent=2) + "\n"
        validate(text)
        path = folder / f"{name}.cdx.json"
        path.write_text(text)
        print(f"{path}: {len(bom['components'])} components")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
