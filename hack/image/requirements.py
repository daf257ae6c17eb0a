"""Writes what an image installs before our code: requirements.txt, from pyproject.toml's lists and hashes.txt.

Each line is an exact version with the SHA-256 of its files, and the list is complete, so pip resolves nothing. Runs on
the base image's own Python with only the standard library, so that the layer of dependencies depends on this one file.
A change of code, or of a linter's settings in pyproject.toml, leaves it as it is.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path


@dataclass
class Pin:
    """One package of hashes.txt."""

    version: str
    """The requirement, such as ``numpy==2.5.0``, with its marker if it has one."""
    hashes: list[str] = field(default_factory=list)
    """Options of pip, such as ``--hash=sha256:…``."""
    wanted_by: set[str] = field(default_factory=set)
    """Normalised names of the packages that require it."""

    def text(self, *, hashed: bool) -> str:
        """Return its lines in a requirements file."""
        return " \\\n    ".join([self.version, *(self.hashes if hashed else ())])


def normalised(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """Return the normalised name that a requirement begins with."""
    found = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    if found is None:
        raise ValueError(f"no package name in {requirement!r}")
    return normalised(found.group(1))


def read_pins(lines: Iterable[str]) -> dict[str, Pin]:
    """Return the packages of hashes.txt by name. Its form is that of ``uv pip compile --generate-hashes``."""
    found: dict[str, Pin] = {}
    pin = Pin("")
    for line in lines:
        text = line.strip().removesuffix("\\").strip()
        if text.startswith("--hash="):
            pin.hashes.append(text)
        elif line.startswith("    #"):
            wanted_by = text.removeprefix("#").strip().removeprefix("via").strip()
            if wanted_by and not wanted_by.startswith("-"):
                pin.wanted_by.add(name_of(wanted_by))
        elif text and not text.startswith("#"):
            pin = found.setdefault(name_of(text), Pin(text))
    return found


def closure(wanted: Iterable[str], pins: Mapping[str, Pin]) -> set[str]:
    """Return the names that these need, in turn. KeyError for one that hashes.txt lacks."""
    found = {name_of(requirement) for requirement in wanted}
    if lacking := found - set(pins):
        raise KeyError(f"{', '.join(sorted(lacking))} not in hashes.txt: run `make lock`")
    while more := {name for name, pin in pins.items() if pin.wanted_by & found} - found:
        found |= more
    return found


def kept_versions(patterns: Sequence[str], installed: Mapping[str, str]) -> dict[str, str]:
    """Return name and version of each installed distribution that a pattern names: the base's, to be left alone."""
    return {name: version for name, version in installed.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pyproject", type=Path, default=Path("pyproject.toml"))
    parser.add_argument("--hashes", type=Path, default=Path(__file__).with_name("hashes.txt"))
    parser.add_argument("--extra", nargs="*", default=[], help="the optional lists that are wanted too")
    parser.add_argument("--build", action="store_true", help="only what building our own wheel takes")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="NAME", help="leave these out: the image never uses them"
    )
    parser.add_argument("--keep", nargs="*", default=[], metavar="PATTERN", help="leave these as the base has them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the file")
    given = parser.parse_args(argv)
    project = tomllib.loads(given.pyproject.read_text())
    if given.build:
        wanted = list(project["build-system"]["requires"])
    else:
        extras = project["project"]["optional-dependencies"]
        for extra in given.extra:
            if extra not in extras:
                parser.error(f"--extra: {given.pyproject} has no {extra!r}; it has {', '.join(extras)}")
        wanted = [*project["project"]["dependencies"], *(line for extra in given.extra for line in extras[extra])]
    installed: dict[str, str] = {}
    for found in metadata.distributions():  # in the order of sys.path: the first of a name is the one imported
        installed.setdefault(normalised(found.metadata["Name"]), found.version)
    kept = kept_versions(given.keep, installed)
    unused = {normalised(name) for name in given.without}
    if unknown := unused - {name_of(line) for line in wanted}:
        parser.error(f"--without: {given.pyproject} does not ask for {', '.join(sorted(unknown))}")
    pins = read_pins(given.hashes.read_text().splitlines())
    names = closure([line for line in wanted if name_of(line) not in unused], pins) - set(kept)
    hashed = bool(os.environ.get("HASHES", "--require-hashes"))
    given.out.mkdir(parents=True, exist_ok=True)
    lines = [pins[name].text(hashed=hashed) for name in sorted(names)]
    (given.out / "requirements.txt").write_text("\n".join(lines) + "\n")
    for name, version in sorted(kept.items()):
        print(f"kept from the base image: {name} {version}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
