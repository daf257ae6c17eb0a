"""Which failures of GPUs, of NCCL and by signals are whose fault."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_api.errors import Outcome
from dpo_testing.runs import PACKAGES
from dpo_trainer.failures import of_signal
from dpo_trainer.launch import _rendezvous
from dpo_trainer.results import read_results, summarise
from dpo_trainer.worker import explain

DEVICE, PROGRAM, MEMORY, LOST = Outcome.DeviceFailed, Outcome.Internal, Outcome.OutOfMemory, Outcome.Communication


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be …", DEVICE),
        ("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error", DEVICE),
        ("CUDA error: unspecified launch failure", DEVICE),
        ("CUDA error: the launch timed out and was terminated", DEVICE),
        ("CUDA error: system not yet initialized", DEVICE),
        ("NVIDIA Xid 79: GPU has fallen off the bus", DEVICE),
        ("NCCL error: unhandled cuda error\nCuda failure 214 'uncorrectable ECC error encountered'", DEVICE),
        ("CUDA error: device-side assert triggered", PROGRAM),
        ("CUDA error: an illegal memory access was encountered", PROGRAM),
        ("CUDA error: invalid device ordinal", PROGRAM),
        ("CUDA error: out of memory", MEMORY),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", MEMORY),
        ("NCCL error in: ProcessGroupNCCL.cpp:3699, remote process exited or there was a network error", LOST),
        ("the hexid is not an error of a GPU", PROGRAM),
    ],
)
def test_the_text_of_an_error_says_whose_it_is(text: str, outcome: Outcome) -> None:
    found, message = explain(RuntimeError(text))
    assert found is outcome, message
    assert text.splitlines()[0] in message


@pytest.mark.parametrize(
    ("number", "gpu", "outcome"),
    [
        (signal.SIGABRT, True, Outcome.Communication),
        (signal.SIGABRT, False, Outcome.Internal),
        (signal.SIGSEGV, True, Outcome.Internal),
        (signal.SIGBUS, False, Outcome.Internal),
        (signal.SIGKILL, True, None),
        (signal.SIGTERM, True, None),
    ],
)
def test_a_signal_says_whose_it_is(number: int, gpu: bool, outcome: Outcome | None) -> None:
    found = of_signal(number, gpu=gpu)
    assert (found and found[0]) == outcome


@pytest.mark.slow
def test_a_process_that_crashes_is_named_with_its_signal(tmp_path: Path) -> None:
    """Not as killed for lack of memory."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, time\nos.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(999)"
    )
    command = [sys.executable, "-m", "dpo_trainer", "agent", *_rendezvous({}), "--nproc-per-node=2", "--max-restarts=0"]
    keys = {"PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, str(script), "--results", str(tmp_path)], env={**os.environ, **keys}, check=False)
    words = summarise(read_results(tmp_path), ended.returncode, asked=False)
    assert (words.outcome, words.message) == ("Internal", "rank 1 crashed (SIGSEGV); the log may hold its stacks")
