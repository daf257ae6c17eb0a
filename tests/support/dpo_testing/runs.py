"""Whole runs for tests: a tiny model and preferences on disk, run in this process or through the launcher."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core
from dpo_api.manifest import DPOJob, parse_job
from dpo_testing.preloaded import NOTES, PreloadedPopen, usable
from dpo_trainer.distributed import World
from dpo_trainer.run import Run, RunOptions
from dpo_trainer.stopping import StopRequest

gc.collect()
gc.freeze()  # what is imported stays: then collecting what a run leaves takes little

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = os.pathsep.join(str(ROOT / package) for package in ("crds", "operator", "trainer", "tests/support"))


def job_of(spec: Mapping[str, Any], name: str = "test") -> DPOJob:
    """The DPOJob of a spec in the manifest's own form."""
    return parse_job(
        {"apiVersion": "dpo-operator.dev/v1alpha1", "kind": "DPOJob", "metadata": {"name": name}, "spec": dict(spec)}
    )


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with nested changes; None removes a key."""
    result = dict(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


@dataclass(frozen=True)
class Finished:
    """What a run left."""

    folder: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        """metrics.jsonl, line by line."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def series(self, key: str) -> list[float]:
        """One metric's values in the order of steps."""
        return [event[key] for event in self.events if key in event]

    @property
    def steps(self) -> list[int]:
        """The steps of the training events, in the file's order."""
        return [event["step"] for event in self.events if "train/loss" in event]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The exported Hugging Face tensors."""
        files = sorted((self.folder / "model").glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


def run_here(spec: Mapping[str, Any], folder: Path, inspect: Callable[[Run], None] | None = None) -> Finished:
    """Run in this process, alone; ``inspect`` sees the run before its groups are torn down."""
    for _ in range(2):  # each of the former run's process groups has a thread that wakes a hundred times a second
        gc.collect()
    job = job_of(spec)
    world = World.join(seed=job.spec.training.seed)
    try:
        run = Run(job, world, StopRequest(), RunOptions(run_dir=str(folder)))
        run.execute()
        if inspect is not None:
            inspect(run)
    finally:
        world.leave()
    return Finished(folder)


def start(
    spec: Mapping[str, Any],
    folder: str | Path,
    *,
    processes: int,
    scratch: Path,
    environment: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
    name: str = "test",
    preloaded: bool = True,
    stored: Mapping[str, Any] | None = None,
) -> subprocess.Popen[bytes]:
    """Start the launcher in a session of its own; ``scratch`` gets its log and its termination message.

    more: further arguments. preloaded: fork its processes from a server that has imported torch
    (dpo_testing.preloaded); False starts new interpreters, for tests of what happens while they import. stored: more
    of the spec's sections as an earlier version wrote them.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "spec.json"
    document = job_of(spec, name).to_dict()
    document["spec"] |= stored or {}
    path.write_text(json.dumps(document))
    command = [sys.executable, "-m", "dpo_trainer", "launch", f"--spec={path}", f"--run-dir={folder}"]
    command += [f"--processes={processes}", f"--last-words={scratch / 'last-words.json'}", *more]
    variables = {**os.environ, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1", **(environment or {})}
    variables[NOTES] = str(scratch / "processes")
    popen = PreloadedPopen if preloaded and usable() else subprocess.Popen
    with (scratch / "log").open("ab") as log:
        return popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)


def finish(child: subprocess.Popen[bytes], scratch: Path, *, code: int = 0, timeout: float = 300) -> dict[str, Any]:
    """Wait for the launcher, expect its exit code, return its termination message."""
    try:
        got = child.wait(timeout)
    except subprocess.TimeoutExpired:
        for process in with_descendants(child.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGUSR1)
        time.sleep(2)
        kill(child)
        text = (scratch / "log").read_text()[-20_000:]
        raise AssertionError(f"it still ran after {timeout:.0f} s; its log ends, with its stacks:\n{text}") from None
    assert got == code, f"exit code {got}, expected {code}; its log ends:\n{(scratch / 'log').read_text()[-3000:]}"
    words: dict[str, Any] = json.loads((scratch / "last-words.json").read_text())
    return words


def run_processes(
    spec: Mapping[str, Any], folder: Path, *, processes: int, scratch: Path, preloaded: bool = True
) -> Finished:
    """Run through the launcher to the end; ``preloaded`` as for ``start``. ``scratch`` gets the events, too."""
    events = (f"--events={scratch / 'events'}",)
    finish(start(spec, folder, processes=processes, scratch=scratch, more=events, preloaded=preloaded), scratch)
    return Finished(folder)


def wait_for_step(folder: Path, step: int, timeout: float = 180) -> None:
    """Wait until metrics.jsonl holds a training step at or after ``step``."""
    deadline = time.monotonic() + timeout
    path = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if any("train/loss" in event and event["step"] >= step for event in whole):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{path} never reached step {step}")


def kill(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL the launcher and all of its descendants, as the kernel's memory killer or a lost node would."""
    for process in with_descendants(child.pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    child.wait()


def with_descendants(pid: int) -> list[int]:
    """Return a process, its children, theirs, and so on."""
    found = [pid]
    for process in found:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == process:
                found.append(int(stat.parent.name))
    return found
