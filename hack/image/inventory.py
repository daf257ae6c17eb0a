"""Prints what this image holds, as JSON: packages of Python and of the system, with their versions.

``docker run --rm -i --entrypoint python IMAGE - < hack/image/inventory.py``. It needs only the standard library.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

DPKG = Path("/var/lib/dpkg")


def python_packages() -> list[dict[str, str]]:
    """Return name and version of each distribution that can be imported, the base image's included."""
    found: dict[str, str] = {}
    for each in metadata.distributions():  # in the order of sys.path: the first of a name is the one imported
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower()
        found.setdefault(name, each.version)
    return [{"name": name, "version": version} for name, version in sorted(found.items())]


def system_packages(folder: Path = DPKG) -> list[dict[str, str]]:
    """Return name, version and architecture of each Debian package; none where the image has no dpkg."""
    texts = [path.read_text(errors="replace") for path in (folder / "status", *sorted(folder.glob("status.d/*")))
             if path.is_file() and not path.name.endswith(".md5sums")]  # fmt: skip
    found = []
    for paragraph in "\n\n".join(texts).split("\n\n"):
        fields = dict(re.findall(r"(?m)^(Package|Version|Architecture|Status): (.+)$", paragraph))
        if "Package" in fields and "Version" in fields and "deinstall" not in fields.get("Status", ""):
            found.append({key.lower(): fields.get(key, "") for key in ("Package", "Version", "Architecture")})
    return sorted(found, key=lambda each: each["package"])


def system_name(file: Path = Path("/etc/os-release")) -> str:
    """Return the name of the distribution, such as debian; empty if the image does not say."""
    if not file.is_file():
        return ""
    found = re.search(r'(?m)^ID="?([a-z0-9._-]+)', file.read_text())
    return found[1] if found else ""


if __name__ == "__main__":
    print(json.dumps({"python": python_packages(), "system": system_packages(), "distribution": system_name()}))
