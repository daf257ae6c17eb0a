"""The comparison with TRL as a whole: it runs, and the losses of both agree."""

import json
import subprocess
import sys

import pytest

from dpo_testing.runs import ROOT

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_losses_are_those_of_trl(form: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "against_trl.py"), "--workloads", "short", "--forms", form]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (run,) = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert run["form"] == form
    assert 0 <= run["counted"]["loss_difference"] < 1e-4
    assert 0 <= run["precomputed"]["loss_difference"] < 1e-4
