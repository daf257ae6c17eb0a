"""hack/build-tools.sh: what it builds, who waits for whom, and what a failure looks like. Go is played by a script."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dpo_testing import s3server
from dpo_testing.kubeapi import eventually

ROOT = Path(__file__).resolve().parents[2]
TOOLS = """\
//go:build tools

package tools

import _ "example.com/server"         // first
import _ "example.com/cmd/prometheus" // prometheus test
import _ "example.com/cmd/node/v2"    // node e2e
"""
GO = """\
#!/bin/bash
# go build ... -o TARGET PACKAGE, or go mod download
if [[ $1 == mod ]]; then printf '\t"Dir": "%s"\n' "$PLAYED/source"; exit; fi
echo "${@: -1}" >>"$PLAYED/built"
while [[ -e "$PLAYED/hold" ]]; do sleep 0.02; done
if [[ -e "$PLAYED/broken" ]]; then echo "undefined: something" >&2; exit 1; fi
echo "${@: -1}" >"${@: -2:1}"
chmod +x "${@: -2:1}"
"""


class Played:
    """A copy of the script with three programs to build, and the Go that builds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "hack" / "build-tools.sh"
        tools = folder / "hack" / "tools"
        (tools / "other").mkdir(parents=True)
        shutil.copy(ROOT / "hack" / "build-tools.sh", self.script)
        (tools / "tools.go").write_text(TOOLS)
        (tools / "go.mod").write_text("module example.com/tools\n\ngo 1.26.0\n")
        (tools / "go.sum").touch()
        for plugins in (tools / "prometheus" / "plugins.go", folder / "source" / "plugins" / "plugins.go"):
            plugins.parent.mkdir(parents=True)
            plugins.write_text(f"of {plugins.parent.name}\n")
        (tools / "ldflags").write_text("-X example.com/version=1\n")
        (tools / "other" / "tools.go").write_text('package tools\n\nimport _ "example.com/other" // other\n')
        self.go = folder / "bin" / "go"
        self.go.parent.mkdir()
        self.go.write_text(GO)
        self.go.chmod(0o755)
        path = f"{self.go.parent}:{os.environ['PATH']}"
        self.env = {"PATH": path, "DPO_TOOLS_DIR": str(folder / "cache"), "PLAYED": str(folder)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([self.script, *words], env=self.env, stdout=pipe, stderr=pipe, text=True)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.script, *words], env=self.env, capture_output=True, text=True, check=False)

    def built(self) -> list[str]:
        record = self.folder / "built"
        return record.read_text().split() if record.exists() else []

    def wait_built(self, count: int) -> None:
        eventually(self.built, until=lambda found: len(found) >= count, seconds=60, what=f"{count} builds")


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path)


@pytest.mark.parametrize(
    ("word", "packages"),
    [
        ("test", ["example.com/other", "example.com/server", "example.com/cmd/prometheus"]),
        ("e2e", ["example.com/other", "example.com/server", "example.com/cmd/node/v2"]),
        ("all", ["example.com/other", "example.com/server", "example.com/cmd/prometheus", "example.com/cmd/node/v2"]),
        ("node", ["example.com/cmd/node/v2"]),
    ],
)
def test_what_is_built_and_only_once(played: Played, word: str, packages: list[str]) -> None:
    first, again = played.run(word), played.run(word)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert played.built() == packages
    assert [Path(line).read_text().strip() for line in first.stdout.split()] == packages
    assert again.stdout == first.stdout


def test_prometheus_registers_the_discoveries_that_we_name(played: Played) -> None:
    first = Path(played.run("first").stdout.strip())
    copy = first.parent / "src" / "prometheus"
    assert (copy / "plugins" / "plugins.go").read_text() == "of prometheus\n"
    pinned = (played.folder / "hack" / "tools" / "go.mod").read_text()
    assert (first.parent / "go.mod").read_text() == f"{pinned}replace github.com/prometheus/prometheus => {copy}\n"


def test_a_changed_pin_is_another_build(played: Played) -> None:
    before = played.run("--path", "first").stdout
    (played.folder / "hack" / "tools" / "other" / "go.sum").write_text("another version\n")
    assert played.run("--path", "first").stdout != before


@pytest.mark.slow
def test_who_needs_a_program_waits_for_the_build_in_the_background(played: Played) -> None:
    hold = played.folder / "hold"
    hold.touch()
    started = played.run("--background", "all")
    assert "building 4 programs in the background" in started.stdout
    played.wait_built(1)
    assert "is running" in played.run("--background", "all").stdout
    waiting = [played.start("other"), played.start("other")]
    hold.unlink()
    for each in waiting:
        out, err = each.communicate(timeout=60)
        assert (each.returncode, Path(out.strip()).read_text()) == (0, "example.com/other\n"), err
    played.wait_built(4)
    assert played.built().count("example.com/other") == 1
    eventually(lambda: played.run("--background", "all").stdout, until=lambda said: said == "", what="all is built")


@pytest.mark.slow
def test_a_failed_build_in_the_background_fails_where_its_program_is_needed(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    (played.folder / "broken").touch()
    played.run("--background", "all")
    played.wait_built(4)
    assert "undefined: something" in next((played.folder / "cache").glob("*/build.log")).read_text()
    done = played.run("node")
    assert done.returncode == 1
    assert "undefined: something" in done.stderr
    assert "build-tools: 'node' did not build" in done.stderr

    monkeypatch.setattr(s3server, "_REPOSITORY", played.folder)
    for name, value in played.env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="undefined: something"):
        s3server.need("node")


def test_without_go(played: Played) -> None:
    played.go.unlink()
    played.env["PATH"] = f"{played.go.parent}:/usr/bin:/bin"
    for words in (["first"], ["--background", "test"]):
        done = played.run(*words)
        assert done.returncode == 3
        assert "Go is not installed" in done.stderr
        assert "version >= 1.26.0" in done.stderr


def test_an_unknown_name(played: Played) -> None:
    done = played.run("kubeadm")
    assert done.returncode == 2
    assert "no program named 'kubeadm' (there are: other first prometheus node)" in done.stderr
