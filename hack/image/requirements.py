"""Writes what an image installs before our code: requirements.txt and constraints.txt, from pyproject.toml's lists.

Runs on the base image's own Python with nothing but the standard library, so that the layer of dependencies depends on
these two files alone: a change of code, or of a linter's settings in pyproject.toml, leaves it as it is.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path


def normalised(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """Return the normalised name that a requirement or constraint begins with."""
    found = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    if found is None:
        raise ValueError(f"no package name in {requirement!r}")
    return normalised(found.group(1))


def kept_versions(patterns: Sequence[str], installed: Mapping[str, str]) -> dict[str, str]:
    """Return name and version of each installed distribution that a pattern names: the base's, to be left alone."""
    return {name: version for name, version in installed.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def written(
    requirements: Iterable[str], constraints: Iterable[str], kept: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Return both files' lines: what is kept is required no more, and held at the version that is there."""
    wanted = [line for line in requirements if name_of(line) not in kept]
    pins = [line.strip() for line in constraints if line.strip() and not line.lstrip().startswith("#")]
    pins = [line for line in pins if name_of(line) not in kept]
    return wanted, [*pins, *(f"{name}=={version}" for name, version in sorted(kept.items()))]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the two files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pyproject", type=Path, default=Path("pyproject.toml"))
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    parser.add_argument("--extra", help="the optional list that is wanted beside the base list")
    parser.add_argument("--build", action="store_true", help="only what building our own wheel takes")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="NAME", help="leave these out: the image never uses them"
    )
    parser.add_argument("--keep", nargs="*", default=[], metavar="PATTERN", help="leave these as the base has them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    given = parser.parse_args(argv)
    project = tomllib.loads(given.pyproject.read_text())
    if given.build:
        wanted = list(project["build-system"]["requires"])
    else:
        extras = project["project"]["optional-dependencies"]
        if given.extra is not None and given.extra not in extras:
            parser.error(f"--extra: {given.pyproject} has no {given.extra!r}; it has {', '.join(extras)}")
        wanted = [*project["project"]["dependencies"], *(extras[given.extra] if given.extra else ())]
    installed: dict[str, str] = {}
    for found in metadata.distributions():  # in the order of sys.path: the first of a name is the one imported
        installed.setdefault(normalised(found.metadata["Name"]), found.version)
    kept = kept_versions(given.keep, installed)
    unused = {normalised(name) for name in given.without}
    if unknown := unused - {name_of(line) for line in wanted}:
        parser.error(f"--without: {given.pyproject} does not ask for {', '.join(sorted(unknown))}")
    wanted = [line for line in wanted if name_of(line) not in unused]
    lines, pins = written(wanted, given.constraints.read_text().splitlines(), kept)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "requirements.txt").write_text("\n".join(lines) + "\n")
    (given.out / "constraints.txt").write_text("\n".join(pins) + "\n")
    for name, version in sorted(kept.items()):
        print(f"kept from the base image: {name} {version}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
