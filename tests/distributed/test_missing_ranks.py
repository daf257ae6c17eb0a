"""A run in which a process stops without ending: the others name it and end the attempt."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_testing.impatient import IMPATIENT, SECONDS
from dpo_testing.preloaded import NOTES, PreloadedPopen, usable
from dpo_testing.runs import PACKAGES, job_of, kill, merged, wait_for_step
from dpo_testing.trajectories import workers_of
from dpo_trainer.launch import _rendezvous
from dpo_trainer.results import read_results, summarise

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruption")]


@pytest.mark.skipif(not usable(), reason="needs forked processes")
def test_a_process_that_stops_is_named_by_the_others(slow_spec: dict[str, Any], tmp_path: Path) -> None:
    # Only steps, and more than the test can miss: elsewhere the others wait without this limit.
    changes = {"training": {"maxSteps": 2000, "validationInterval": 5000}, "checkpoint": {"everySteps": 5000}}
    spec = merged(slow_spec, changes)
    folder, results = tmp_path / "run", tmp_path / "results"
    results.mkdir()
    (tmp_path / "spec.json").write_text(job_of(spec).to_json())
    command = [sys.executable, "-m", "dpo_trainer", "agent", *_rendezvous({}), "--nproc-per-node=3", "--max-restarts=0"]
    command += ["-m", "dpo_testing.impatient", "worker", f"--spec={tmp_path / 'spec.json'}", f"--run-dir={folder}"]
    variables = {**os.environ, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1", NOTES: str(tmp_path / "processes")}
    with (tmp_path / "log").open("wb") as log:
        child = PreloadedPopen(
            [*command, "--results", str(results)], env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_step(folder, 2)
        os.kill(workers_of(tmp_path)[1], signal.SIGSTOP)
        (results / IMPATIENT).touch()
        code = child.wait(240)
    finally:
        kill(child)
    words = summarise(read_results(results), code, asked=False)
    assert words.outcome == Outcome.Communication.name, (tmp_path / "log").read_text()
    expected = r"waited (\d+) s in the [\w ]+: rank 1 has not arrived \(rank 1: [\w ]+, no word for"
    found = re.search(expected, words.message)
    assert found, words.message
    assert int(found[1]) >= SECONDS - 1
    assert sorted(result.rank for result in read_results(results) if result.explains) in ([0], [2], [0, 2])
