"""Runs whose workers are those of dpo_testing.impatient."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_testing.preloaded import NOTES, PreloadedPopen
from dpo_testing.runs import PACKAGES, job_of
from dpo_trainer.launch import _rendezvous


def begin(spec: Mapping[str, Any], scratch: Path, processes: int, **environment: str) -> PreloadedPopen:
    """Start the agent of a run in scratch/run whose workers are impatient; scratch/results gets how they end."""
    (scratch / "results").mkdir()
    (scratch / "spec.json").write_text(job_of(spec).to_json())
    command = [sys.executable, "-m", "dpo_trainer", "agent", *_rendezvous({}), f"--nproc-per-node={processes}"]
    command += ["--max-restarts=0", "-m", "dpo_testing.impatient", "worker", f"--spec={scratch / 'spec.json'}"]
    command += [f"--run-dir={scratch / 'run'}", f"--events={scratch / 'events'}"]
    variables = {**os.environ, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1", NOTES: str(scratch / "processes")}
    with (scratch / "log").open("wb") as log:
        return PreloadedPopen(
            [*command, "--results", str(scratch / "results")],
            env={**variables, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
