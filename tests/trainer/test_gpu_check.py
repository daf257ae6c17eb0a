"""benchmarks/gpu_check.py: every phase runs here on the CPU, and what is wrong in one of them ends it with code 1."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_testing.runs import ROOT

PHASES = ["setup", "kernels", "parity", "life", "quickstart", "speed", "peer"]


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("gpu_check")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "gpu-check.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_smoke(gpu_check: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = gpu_check.main(["--smoke", "--out", str(tmp_path)])
    said = capfd.readouterr().out
    rows = lines(tmp_path)
    assert [(row["phase"], row["status"]) for row in rows] == [(name, "ok") for name in PHASES], said
    assert code == 0
    assert all(row["checks"] > 0 for row in rows)
    assert said.rindex("| phase |") < said.rindex("| peer | ok |")


class Phases:
    """In place of the phases' processes: each runs a line of Python."""

    def __init__(self, gpu_check: Any, out: Path, *, smoke: bool = False) -> None:
        self.module = gpu_check
        self.check = gpu_check.Check(out, smoke=smoke)
        self.out = out

    def report_of(self, name: str) -> str:
        path = self.out / f"{name}.json"
        return path.read_text() if path.exists() else ""

    def run(self, **programs: str) -> tuple[int, dict[str, str]]:
        """Exit code, and the status of each phase."""

        def start(phase: Any, log: Any) -> subprocess.Popen[bytes]:
            text = f"from gpu.report import Report; r = Report(Path({str(self.out)!r}) / '{phase.name}.json')"
            program = f"import sys, time; from pathlib import Path; {text}; {programs[phase.name]}"
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
            command = [sys.executable, "-c", program]
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            while "sleep" in program and "found" not in self.report_of(phase.name):  # its limit is counted from there
                time.sleep(0.01)
            return child

        self.check.start = start
        code = self.check.run(
            [self.module.Phase(name, 0.1 if "sleep" in programs[name] else 60, ()) for name in programs]
        )
        return code, {row["phase"]: row["status"] for row in lines(self.out)}


RIGHT = "r.within('it', 1.0, 2.0)"


def test_a_check_that_fails_is_an_error(gpu_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, status = Phases(gpu_check, tmp_path).run(
        setup=RIGHT,
        kernels="r.within('its error', 3.0, 2.0); sys.exit(1)",
        parity="r.within('NaN', float('nan'), 2.0); sys.exit(1)",
        life=f"{RIGHT}; raise ValueError('broken')",
        quickstart="r.add(figure=1.0)",  # checks nothing
    )
    assert code == 1
    assert status == {"setup": "ok", "kernels": "failed", "parity": "failed", "life": "error", "quickstart": "error"}
    said = capsys.readouterr().out
    assert "its error is 3, at most 2 is right" in said
    assert "ValueError: broken" in said
    assert "wrong: kernels, parity, life, quickstart" in said


@pytest.mark.parametrize("smoke", [False, True])
def test_what_is_slow_is_named(gpu_check: Any, tmp_path: Path, smoke: bool) -> None:
    """Wrong only in the smoke run. What the phase had found before its limit is kept."""
    phases = Phases(gpu_check, tmp_path, smoke=smoke)
    code, status = phases.run(parity=f"{RIGHT}; r.add(found=3); time.sleep(60)")
    assert (code, status) == (int(smoke), {"parity": "ended"})
    assert lines(tmp_path)[0]["figures"] == {"found": 3}
    phases.check.ends -= gpu_check.DEADLINE_SECONDS
    code, status = phases.run(speed=RIGHT)
    assert (code, status) == (int(smoke), {"parity": "ended", "speed": "skipped"})


def test_without_a_gpu_it_says_so(gpu_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert "there is no GPU here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_limits_fit_the_deadline(gpu_check: Any) -> None:
    """Phases before the last two never take its time: they hold what is right or wrong."""
    assert [phase.name for phase in gpu_check.PHASES] == PHASES
    *others, speed, _peer = gpu_check.PHASES
    assert sum(phase.seconds for phase in others) + gpu_check.WORTH * speed.seconds < gpu_check.DEADLINE_SECONDS
