"""A second build of the same tree: another version, other images, and a CRD with one more optional field."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dpo_api.version import VERSION as OWN
from dpo_testing.realcluster import daemons, images
from dpo_testing.realcluster.layout import REPOSITORY, Layout

_MAJOR, _MINOR, _ = OWN.split(".")
VERSION = f"{_MAJOR}.{int(_MINOR) + 1}.0"
FIELD = "note"
OPERATOR_IMAGE = f"localhost/dpo-operator:{VERSION}"
TRAINER_IMAGE = f"localhost/dpo-trainer:{VERSION}-cpu"

_PACKAGES = ("charts", "crds", "operator", "trainer", "hack")
_BEFORE = "    image_pull_policy: "
_ADDED = f'    {FIELD}: str | None = Field(default=None, description="Whatever one wants to say.", max_length=64)\n'


def tree(layout: Layout) -> Path:
    """Return a copy of this tree as a later version, with all generated files written again."""
    folder = layout.run / "next"
    shutil.rmtree(folder, ignore_errors=True)
    for package in _PACKAGES:
        shutil.copytree(
            REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)
    _replace(folder / "crds" / "dpo_api" / "version.py", r'^VERSION = ".*"$', f'VERSION = "{VERSION}"')
    _replace(folder / "pyproject.toml", r'^version = ".*"$', f'version = "{VERSION}"')
    _replace(folder / "crds" / "dpo_api" / "spec.py", f"^{re.escape(_BEFORE)}", _ADDED + _BEFORE)
    (folder / "crds" / "dpojobs.yaml").write_text(_python(folder, "-m", "dpo_api.crd"))
    _python(folder, "hack/chart.py")
    return folder


def build(layout: Layout, folder: Path) -> None:
    """Build both images of the copy. Only the layers of our own code are new."""
    images.start_builder(layout)
    try:
        images.product(layout, "operator", OPERATOR_IMAGE, context=folder, VERSION=VERSION)
        images.product(layout, "trainer", TRAINER_IMAGE, context=folder, target="cpu", VERSION=VERSION)
    finally:
        daemons.stop(layout, "buildkitd")


def _replace(path: Path, pattern: str, text: str) -> None:
    after, count = re.subn(pattern, text.replace("\\", "\\\\"), path.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{pattern} is {count} times in {path.name}"
    path.write_text(after)


def _python(folder: Path, *words: str) -> str:
    packages = os.pathsep.join(str(folder / package) for package in ("crds", "operator", "trainer", "charts"))
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout
