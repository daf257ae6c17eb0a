"""Every link from one page of this repository to another leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "charts").rglob("README.md"))]


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(line.lstrip("#")) for line in text.splitlines() if line.startswith("#")}


def broken(page: Path) -> Iterator[str]:
    for match in re.finditer(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        path, anchor = match.groups()
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{page.name}: {path} does not exist"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{page.name}: {path or page.name} has no heading #{anchor}"


def test_links_between_pages_lead_somewhere() -> None:
    assert [text for page in PAGES for text in broken(page)] == []


def test_every_make_target_that_a_page_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    command = re.compile(r"(?:^ *(?:\$ )?(?:[A-Z_]+=\S+ )*|`)make ([a-z][a-z0-9-]*)", re.MULTILINE)
    named = {target for page in [*PAGES, *ROOT.glob("Dockerfile.*")] for target in command.findall(page.read_text())}
    assert {"images", "sbom", "test", "e2e", "quickstart"} <= named
    assert named <= targets


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](gone.md) [y](#b) [z](#a-b) [w](https://example.com/#c)\n")
    assert list(broken(page)) == ["page.md: gone.md does not exist", "page.md: page.md has no heading #b"]
