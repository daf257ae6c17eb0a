"""Checks and measures the trainer on one GPU: one command, which ends by itself within 460 seconds.

    python benchmarks/gpu_check.py --out FOLDER [--only PHASE ...]     on a machine with a GPU
    python benchmarks/gpu_check.py --smoke --out FOLDER                every phase on the CPU, with tiny sizes

Phases: setup (versions, and what the machine can do at best), kernels (attention and LM head against float64), parity
(tiny models of four families against golden results of the CPU), life (checkpoint, stop, resume, export), quickstart
(`dpo run`), speed (1B, 8B with LoRA, 8 of 32 layers of 8B) and peer (the same in transformers). Each is a process with
a limit of its own and leaves one JSON line in FOLDER/gpu-check.jsonl. A phase for which no time is left is skipped and
named. The table comes last.

The exit code is 1 if something is wrong: a check failed, or a phase ended with an error. Slowness, a phase that was
skipped or one that its limit ended are no such thing; with --smoke, they are. Nothing is read from a network.
Needed: torch (2.11 or later), megatron-core, transformers, and the trainer's other dependencies; of these pydantic,
PyYAML, zstandard, boto3, typer and rich are what an image for machine learning may lack.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [str(ROOT / package) for package in ("crds", "operator", "trainer", "tests/support")]
sys.path[:0] = [str(ROOT / "benchmarks"), *PACKAGES]

STARTED = time.monotonic()
DEADLINE_SECONDS = 460  # of the whole check
WORTH = 0.4
"""A phase is started if this share of its limit is left."""


@dataclass(frozen=True)
class Phase:
    """A module of gpu/, and the most seconds that it may take."""

    name: str
    seconds: float
    figures: tuple[str, ...]
    """What the table shows of it."""


PHASES = (
    Phase("setup", 50, ("gpu", "torch", "gemm_bf16_tflops", "copy_gb_per_s", "milliseconds_per_new_length")),
    Phase("kernels", 80, ("kernels", "attention_errors", "head_errors")),
    Phase("parity", 80, ("worst", "fp8")),
    Phase("life", 70, ("steps_repeated", "gpu_peak_gib", "host_peak_gib")),
    Phase("quickstart", 70, ("held_out_accuracy",)),
    Phase("speed", 170, ()),
    Phase("peer", 80, ("pairs_per_second", "peer_pairs_per_second", "ratio")),
)
CASE_FIGURES = ("pairs_per_second", "tokens_per_second", "mfu", "share_of_gemm", "share_of_gemm_with_new_lengths")
CASE_FIGURES += ("peak_gib", "predicted_gib", "launches_of_a_pack", "syncs_of_a_step")

Row = dict[str, Any]


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu-check.jsonl and the phases' logs")
    parser.add_argument("--smoke", action="store_true", help="all phases on the CPU, tiny")
    parser.add_argument("--only", action="append", choices=[phase.name for phase in PHASES], help="this phase alone")
    parser.add_argument("--golden", action="store_true", help="write gpu/golden.json, on a machine without a GPU")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.golden:
        import_module("gpu.parity").write_golden()
        return 0
    if options.phase:
        return run_phase(options.phase, options.out, small=options.smoke)
    if not options.smoke and not has_gpu():
        print("gpu_check: there is no GPU here, so nothing is checked; --smoke runs every phase on the CPU")
        return 0
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    out.mkdir(parents=True, exist_ok=True)
    chosen = [phase for phase in PHASES if not options.only or phase.name in options.only]
    return Check(out, smoke=options.smoke).run(chosen)


def has_gpu() -> bool:
    """Whether torch can use one."""
    import torch

    return torch.cuda.is_available()


def run_phase(name: str, out: Path, *, small: bool) -> int:
    """Run one phase in this process; its report is left in a file."""
    import torch
    from gpu.report import Report

    torch.set_float32_matmul_precision("highest")  # as the trainer does: images of NVIDIA's allow TF32
    report = Report(out / f"{name}.json")
    import_module(f"gpu.{name}").run(report, small)
    report.add()
    return 1 if report.failed else 0


class Check:
    """All phases, one after the other, until the time is up."""

    def __init__(self, out: Path, *, smoke: bool) -> None:
        self.out, self.smoke = out, smoke
        self.patience = 8 if smoke else 1  # a CPU may have other work
        self.ends = STARTED + DEADLINE_SECONDS
        self.lines = out / "gpu-check.jsonl"
        self.lines.unlink(missing_ok=True)

    def run(self, phases: Sequence[Phase]) -> int:
        """Run them, print the table, return the exit code."""
        rows: list[Row] = []
        for phase in phases:
            row = self.one(phase)
            rows.append(row)
            with self.lines.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            print(f"{phase.name}: {row['status']} in {row['seconds']:.1f} s", flush=True)
        print(table(rows))
        wrong = ("failed", "error") if not self.smoke else ("failed", "error", "skipped", "ended")
        bad = [row["phase"] for row in rows if row["status"] in wrong]
        print(f"gpu_check: {'wrong: ' + ', '.join(bad) if bad else 'all that ran is right'}; {self.lines}")
        return 1 if bad else 0

    def one(self, phase: Phase) -> Row:
        """Run one phase as a process of its own."""
        left = self.ends - time.monotonic()
        if left < WORTH * phase.seconds:
            return {"phase": phase.name, "status": "skipped", "seconds": 0.0, "left": left}
        (self.out / f"{phase.name}.json").unlink(missing_ok=True)
        began = time.monotonic()
        with (self.out / f"{phase.name}.log").open("wb") as log:
            child = self.start(phase, log)
            try:
                code: int | None = child.wait(min(left, self.patience * phase.seconds))
            except subprocess.TimeoutExpired:
                code = None
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        row: Row = {"phase": phase.name, "status": "ended", "seconds": time.monotonic() - began}
        found: Row = {"figures": {}, "checks": 0, "failed": []}
        with suppress(OSError):
            found = json.loads((self.out / f"{phase.name}.json").read_text())
        row |= found
        if code is not None:
            row["status"] = "ok" if code == 0 else "failed" if found["failed"] else "error"
        elif found["failed"]:
            row["status"] = "failed"
        if code == 0 and not found["checks"]:
            row["status"] = "error"
        if row["status"] != "ok":
            row["log"] = (self.out / f"{phase.name}.log").read_text(errors="replace")[-3000:]
        return row

    def start(self, phase: Phase, log: Any) -> subprocess.Popen[Any]:
        """Start it. With --smoke it is forked, where that works, from a process that has torch imported."""
        options = ["--phase", phase.name, "--out", str(self.out)]
        path = os.pathsep.join([*PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        popen: type[subprocess.Popen[Any]] = subprocess.Popen
        command = [sys.executable, str(Path(__file__).resolve()), *options]
        if self.smoke:
            from dpo_testing.preloaded import PreloadedPopen, usable

            # Triton's interpreter runs the kernels: it must be chosen before Triton is imported, so in the server too.
            os.environ["TRITON_INTERPRET"] = "1"
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
            command.append("--smoke")
            if usable():
                popen, command = PreloadedPopen, [sys.executable, "-m", "dpo_testing.gpu_phase", *command[2:]]
        else:
            from dpo_trainer.launch import allocator

            environment |= allocator(environment)
        return popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def table(rows: Sequence[Row]) -> str:
    """The results as a table in Markdown."""
    lines = ["", "| phase | | seconds | checks | |", "|---|---|---|---|---|"]
    by_name = {phase.name: phase for phase in PHASES}
    for row in rows:
        figures = row.get("figures", {})
        texts = [f"{name} {_short(figures[name])}" for name in by_name[row["phase"]].figures if name in figures]
        texts += [f"**{text}**" for text in row.get("failed", [])[:3]]
        cells = [row["phase"], row["status"], f"{row['seconds']:.1f}", str(row.get("checks", 0)), "; ".join(texts)]
        lines.append(f"| {' | '.join(cells)} |")
    cases = {name: case for row in rows for name, case in row.get("figures", {}).get("cases", {}).items()}
    if cases:
        lines += ["", "| " + " | ".join(["", *(name.replace("_", " ") for name in CASE_FIGURES)]) + " |"]
        lines.append("|---" * (len(CASE_FIGURES) + 1) + "|")
        lines += [
            f"| {name} | {' | '.join(_short(case.get(key)) for key in CASE_FIGURES)} |" for name, case in cases.items()
        ]
    for row in rows:
        if "log" in row:
            lines += ["", f"{row['phase']}, the end of its log:", row["log"]]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " → ".join(_short(each) for each in value)
    return "–" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
