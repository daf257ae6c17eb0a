"""Runs a pod's command line here and checks the environment of the training processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_api.manifest import parse_job
from dpo_operator.backend.pytorchjob import Identity, build_child, spec_json
from dpo_operator.config import Settings
from dpo_testing.runs import PACKAGES, kill, with_descendants
from dpo_testing.simcluster import manifest


def worker_environment(launcher: subprocess.Popen[bytes], timeout: float = 120) -> dict[str, str]:
    """Wait for the launcher's first worker and return its environment."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and launcher.poll() is None:
        for process in with_descendants(launcher.pid):
            try:
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
            except OSError:
                continue
            found = dict(variable.split("=", 1) for variable in variables if "=" in variable)
            if b"worker" in words and "RANK" in found and b"agent" not in words:
                return found
        time.sleep(0.02)
    raise AssertionError(f"no worker was seen; the launcher's exit code is {launcher.poll()}")


KERNELS = ("NVTE_", "CUBLAS_", "PYTORCH_")


@pytest.mark.slow
def test_the_kernels_variables_reach_the_workers(tmp_path: Path) -> None:
    job = parse_job(
        manifest(
            resources={"gpusPerNode": 0},
            transformerEngine={"flashAttention": False, "fusedAttention": True},
            training={"deterministic": True},
            podTemplate={"env": [{"name": "NVTE_FLASH_ATTN", "value": "1"}, {"name": "NVTE_DEBUG", "value": "1"}]},
        )
    )
    body = build_child(job, Identity("job", "team", "uid-1", created=1), 1, "trainer:1", Settings(), ())
    template = body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    container: dict[str, Any] = template["containers"][0]
    spec = tmp_path / "spec.json"
    spec.write_text(spec_json(job), encoding="utf-8")
    here = {
        "python": sys.executable,
        "/etc/dpo/spec/spec.json": str(spec),
        str(job.spec.checkpoint.uri): str(tmp_path / "run"),
        "/dev/termination-log": str(tmp_path / "words"),
        "9400": "0",
    }
    command = [here.get(word, word) for word in container["command"]]
    assert set(here.values()) <= set(command)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(KERNELS)}
    own = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    variables = {**inherited, **own, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
    try:
        seen = worker_environment(launcher)
    finally:
        kill(launcher)
    assert {name: value for name, value in seen.items() if name.startswith(KERNELS)} == {
        "NVTE_FLASH_ATTN": "0",  # the field takes precedence over the pod's own variable
        "NVTE_FUSED_ATTN": "1",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NVTE_DEBUG": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
