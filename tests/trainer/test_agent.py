"""How a node's processes come to their end: together, soon after one of them has failed, and never cut short before."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_api.errors import Outcome
from dpo_testing.runs import PACKAGES, job_of
from dpo_trainer.agent import Worker, end
from dpo_trainer.launch import _rendezvous

HANGING = """
import os, signal, sys, time
import torch, torch.distributed as dist

folder = sys.argv[sys.argv.index("--results") + 1]
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))  # noted, as a run does
dist.init_process_group("gloo")
dist.barrier()
open(f"{folder}/ready-{dist.get_rank()}", "w").write(str(os.getpid()))
if dist.get_rank() == 1:
    while not asked:
        time.sleep(0.01)
    agent = os.getppid()
    if os.fork() == 0:  # holds the connections open, so that Gloo learns of nothing: as NCCL on one node
        while os.path.exists(f"/proc/{agent}"):
            time.sleep(0.1)
        os._exit(0)
    os._exit(10)
dist.all_reduce(torch.ones(1))
"""


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_process_that_hangs_in_a_collective_does_not_wait_for_the_grace_period(tmp_path: Path) -> None:
    """The peer fails while all are asked to stop: an hour is there for checkpoints, and nobody left to write one."""
    script = tmp_path / "worker.py"
    script.write_text(HANGING)
    command = [sys.executable, "-m", "dpo_trainer", "agent", *_rendezvous({}), "--nproc-per-node=2", "--max-restarts=0"]
    keys = {"PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}
    child = subprocess.Popen([*command, str(script), "--results", str(tmp_path)], env={**os.environ, **keys})
    try:
        wait_until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)), "the processes never met")
        hanging = int((tmp_path / "ready-0").read_text())
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == Outcome.Stopped.exit_code
        assert not Path(f"/proc/{hanging}").exists()
    finally:
        child.kill()


@pytest.fixture
def started() -> Iterator[Callable[[Path, str], Worker]]:
    processes = []

    def start(result: Path, code: str) -> Worker:
        """A process that runs ``code`` and is deaf to SIGTERM."""
        deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        deaf += "signal.signal(signal.SIGUSR1, signal.SIG_IGN); print(flush=True)\n"
        process = subprocess.Popen([sys.executable, "-c", deaf + code], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return Worker(process, result, process.send_signal)

    yield start
    for process in processes:
        process.kill()
        process.wait()


HOUR = 3600.0


def test_a_failure_ends_those_that_hang_and_leaves_time_to_those_that_end(
    started: Callable[[Path, str], Worker], tmp_path: Path
) -> None:
    (tmp_path / "ending").write_text("{}")
    failed = started(tmp_path / "failed", "sys.exit(10)")
    hangs = started(tmp_path / "hangs", "time.sleep(3600)")
    ending = started(
        tmp_path / "ending", f"import os\nwhile os.path.exists('/proc/{hangs.process.pid}/exe'): time.sleep(0.01)"
    )
    end([failed, hangs, ending], signal.SIGTERM, HOUR, peer=0.2, ending=HOUR)
    assert [worker.process.poll() for worker in (failed, hangs, ending)] == [10, -signal.SIGKILL, 0]


@pytest.mark.parametrize("code", [0, Outcome.Stopped.exit_code])
@pytest.mark.slow
def test_one_that_left_by_agreement_hurries_nobody(
    code: int, started: Callable[[Path, str], Worker], tmp_path: Path
) -> None:
    """The last rank may still write the checkpoint's marker."""
    left = started(tmp_path / "left", f"sys.exit({code})")
    left.process.wait()
    saves = started(tmp_path / "saves", "time.sleep(1)")
    end([left, saves], signal.SIGTERM, HOUR, peer=0.0, ending=HOUR)
    assert saves.process.poll() == 0


def test_an_end_is_seen_though_a_signal_cut_short_the_poll(tmp_path: Path) -> None:
    """torchrun's handler raises wherever the agent is: inside `poll` it leaves this lock held."""
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(10)"])
    worker = Worker(process, tmp_path / "result", process.send_signal)
    process._waitpid_lock.acquire()  # type: ignore[attr-defined]
    try:
        wait_until(lambda: not worker.running, "the end was never seen")
        assert (worker.code, process.poll(), worker.failed) == (10, None, True)
    finally:
        process._waitpid_lock.release()  # type: ignore[attr-defined]
        process.wait()


def test_a_signal_is_an_end_too(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    worker = Worker(process, tmp_path / "result", process.send_signal)
    with process._waitpid_lock:  # type: ignore[attr-defined]
        assert worker.running
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: not worker.running, "the end was never seen")
        assert (worker.code, worker.failed) == (-signal.SIGKILL, True)
    process.wait()


@pytest.mark.slow
def test_one_that_has_left_its_result_is_not_given_the_time_of_a_checkpoint(
    started: Callable[[Path, str], Worker], tmp_path: Path
) -> None:
    (tmp_path / "hangs").write_text("{}")
    hangs = started(tmp_path / "hangs", "time.sleep(3600)")
    end([hangs], signal.SIGTERM, HOUR, ending=0.2)
    assert hangs.code == -signal.SIGKILL


@pytest.mark.slow
def test_one_that_is_killed_says_first_where_it_hangs(tmp_path: Path) -> None:
    code = (
        "import faulthandler, signal, sys, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "faulthandler.register(signal.SIGUSR1)\nprint(flush=True)\n"
        "def deaf(): threading.Event().wait()\ndeaf()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    end([Worker(process, tmp_path / "result", process.send_signal)], signal.SIGTERM, 0.1)
    assert process.wait() == -signal.SIGKILL
    assert b"in deaf" in process.stderr.read()


@pytest.mark.slow
def test_whoever_outlasts_all_patience_is_killed(started: Callable[[Path, str], Worker], tmp_path: Path) -> None:
    (tmp_path / "ending").write_text("{}")
    workers = [started(tmp_path / name, "time.sleep(3600)") for name in ("saves", "ending")]
    end(workers, signal.SIGTERM, 0.1, peer=HOUR, ending=0.2)
    assert [worker.process.poll() for worker in workers] == [-signal.SIGKILL] * 2


@pytest.mark.slow
def test_a_taken_rendezvous_port_is_named(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(job_of({"model": {"huggingFace": {"uri": "m"}}, "data": {"train": [{"uri": "d"}]}}).to_json())
    words, log = tmp_path / "words", tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as taken, log.open("wb") as output:
        port = str(taken.getsockname()[1])
        nodes = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
        command = [sys.executable, "-m", "dpo_trainer", "launch", f"--spec={spec}", f"--last-words={words}"]
        keys = {**os.environ, **nodes, "PYTHONPATH": PACKAGES}
        code = subprocess.run(command, env=keys, stdout=output, stderr=output, timeout=120, check=False).returncode
    assert code == Outcome.PortInUse.exit_code
    assert f"cannot listen on port {port} (PET_MASTER_PORT)" in json.loads(words.read_text())["message"]
    assert "Traceback" not in log.read_text()
