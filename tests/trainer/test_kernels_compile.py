"""Triton's kernels are compiled to machine code for GPUs, which needs none: their interpreter accepts more."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_every_kernel_compiles_and_reads_16_bytes_at_a_time() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["TRITON_INTERPRET"] = "0"
    command = [sys.executable, "-m", "dpo_testing.compiled_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 42
    for name, figures in found.items():
        assert figures["bits"] == 128, name
        assert figures["shared"] <= 48 * 1024, name
