"""Every link from one page of this repository to another leads somewhere."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "charts").rglob("README.md")),
    *sorted(GITHUB.rglob("*.md")),
]


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
    for workflow in (GITHUB / "workflows").glob("*.yml"):
        called = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", workflow.read_text()))
        assert called, workflow
        assert called <= targets, workflow


def commands(page: Path) -> list[str]:
    """The lines of a page and the code in them, each once, long commands joined."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    return [part for line in text.splitlines() for part in line.split("`")]


def test_no_command_gives_up_early_or_looks_in_the_wrong_namespace() -> None:
    """`kubectl wait` ends after 30 s otherwise, and Helm looks for a release in the namespace of the context."""
    waits = [line for page in PAGES for line in commands(page) if re.search(r"kubectl (-n \S+ )?wait ", line)]
    assert len(waits) >= 3
    assert [line for line in waits if "--timeout=" not in line] == []
    release = re.compile(r"helm (get \w+|test|install|upgrade|rollback|uninstall) dpo-operator\b")
    helms = [line for page in PAGES for line in commands(page) if release.search(line)]
    assert len(helms) >= 8
    assert [line for line in helms if not re.search(r" (-n|--namespace)[ =]", line)] == []


def test_the_command_that_asks_for_stacks_finds_the_trainers_processes_and_not_itself(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    found = re.search(r"kubectl exec POD -- sh -c '(.*?)'`", page)
    assert found is not None
    trainer = ["python", "-m", "dpo_trainer"]
    processes = {
        1: [*trainer, "launch", "--spec", "/etc/dpo/spec/spec.json"],
        7: [*trainer, "agent", "--standalone", "-m", "dpo_trainer", "worker", "--results", "/tmp/r"],
        8: ["/opt/dpo/bin/python", "-u", "-m", "dpo_trainer", "worker", "--results", "/tmp/r"],
        9: ["sh", "-c", found[1]],
    }
    for number, words in processes.items():
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes("".join(f"{word}\0" for word in words).encode())
    script = found[1].replace("/proc/", f"{tmp_path}/").replace("kill -USR1", "echo")
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["7", "8"], ""), "SIGUSR1 ends a shell"


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](gone.md) [y](#b) [z](#a-b) [w](https://example.com/#c)\n")
    assert list(broken(page)) == ["page.md: gone.md does not exist", "page.md: page.md has no heading #b"]
