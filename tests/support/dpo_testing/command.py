"""The `dpo` command as users have it: a process of its own, with the real trainer behind it, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_api.errors import Outcome
from dpo_testing.cli import PACKAGES, Said
from dpo_testing.preloaded import PreloadedPopen, usable
from dpo_testing.s3server import no_aws

_UNSET = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "DPO_PVC_ROOT", "DPO_CA_BUNDLE", "PET_NPROC_PER_NODE")
_TRACES = ("Traceback", "most recent call last", '  File "')


@dataclass(frozen=True)
class Command:
    """Runs `python -m dpo_cli` in ``folder``, on CPU, with the cache in it; ``variables`` join its environment."""

    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    preloaded: bool = True
    """False: new interpreters, for a test of the whole way that a user's command takes."""

    def environment(self, **more: str) -> dict[str, str]:
        """What the process sees; nothing of this machine's cloud accounts or terminal."""
        own = {name: value for name, value in os.environ.items() if name not in _UNSET and not name.startswith("AWS_")}
        ours = {
            "PYTHONPATH": os.pathsep.join(PACKAGES),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DPO_CACHE_DIR": str(self.folder / "cache"),
        }
        return own | no_aws() | ours | dict(self.variables) | more

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        """Start it, forked with its imports done (dpo_testing.preloaded); ``more`` are environment variables."""
        command = [sys.executable, "-m", "dpo_cli", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        popen = PreloadedPopen if self.preloaded and usable() else subprocess.Popen
        return popen(command, cwd=self.folder, env=self.environment(**more), **pipes)

    def __call__(self, *arguments: str, **more: str) -> Said:
        """Run it to its end; what it says never holds a traceback."""
        return self.finish(self.start(*arguments, **more))

    @staticmethod
    def finish(child: subprocess.Popen[str], timeout: float = 400) -> Said:
        """Wait for one that was started."""
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.terminate()  # which ends the trainer as well
            out, err = child.communicate(timeout=60)
            raise AssertionError(f"dpo did not end in {timeout} s; it said:\n{out}\n{err}") from None
        assert not any(trace in out + err for trace in _TRACES), out + err
        return Said(child.returncode, out, err)

    def write(self, spec: Mapping[str, Any], name: str = "tiny", file: str = "job.yaml") -> str:
        """Write a manifest and return its name in the folder."""
        document = {
            "apiVersion": "dpo-operator.dev/v1alpha1",
            "kind": "DPOJob",
            "metadata": {"name": name},
            "spec": dict(spec),
        }
        (self.folder / file).write_text(yaml.safe_dump(document, sort_keys=False))
        return file


def only_error(said: Said, outcome: Outcome) -> str:
    """The command failed with this outcome's code and exactly one error: its text, with the lines beneath it."""
    assert said.code == outcome.exit_code, said.all
    lines = said.all.splitlines()
    found = [number for number, line in enumerate(lines) if line.lstrip().startswith("error ")]
    assert len(found) == 1, said.all
    assert "internal error" not in said.all, said.all
    return "\n".join(lines[found[0] :])


def quiet_log(folder: Path) -> None:
    """The trainer's own log of a mistake that was foreseen holds no traceback either."""
    log = folder / "trainer.log"
    text = log.read_text() if log.exists() else ""
    assert not any(trace in text for trace in _TRACES), text
