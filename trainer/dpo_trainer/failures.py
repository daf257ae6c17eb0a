"""What the texts of CUDA and NCCL, and the signals that end a process, say about the cause.

Imports neither torch nor Megatron-Core: the agent uses it.
"""

import re
import signal

from dpo_api.errors import Outcome

_OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")

_PROGRAM = ("device-side assert", "illegal memory access", "illegal instruction", "misaligned address")
"""Errors of a kernel's own arithmetic of addresses: no other GPU would do better."""

_DEVICE = (
    "ecc error",
    "nvlink",
    "unspecified launch failure",
    "hardware stack error",
    "gpu is lost",
    "fallen off the bus",
    "launch timed out",
    "no cuda-capable device",
    "busy or unavailable",
    "system not yet initialized",
    "driver shutting down",
    "unknown error",
)
"""Errors of a GPU, its links or its driver, in the words of CUDA's table of errors."""

_SPEAKERS = re.compile(r"\b(cuda|cublas|cudnn|nccl|nvidia)")


def of_text(text: str) -> tuple[Outcome, str] | None:
    """Return the outcome of an error with this text, and advice; None if it is not of CUDA or NCCL or has no cause."""
    small = text.lower()
    if not _SPEAKERS.search(small):
        return None
    for words, outcome, advice in (
        (_OUT_OF_MEMORY, Outcome.OutOfMemory, "lower training.packing.maxTokens or data.maxLength, or use LoRA"),
        (_PROGRAM, Outcome.Internal, "set CUDA_LAUNCH_BLOCKING=1 to see the operation, and report it"),
        (_DEVICE, Outcome.DeviceFailed, "the kernel's log of the node has the driver's Xid"),
    ):
        if any(word in small for word in words):
            return outcome, advice
    return None


def of_signal(number: int, *, gpu: bool) -> tuple[Outcome, str] | None:
    """Return the outcome of a process that this signal ended before it could report, and a sentence.

    None for signals that another process sends, such as SIGKILL. gpu: whether the node has one.
    """
    if number == signal.SIGABRT and gpu:
        return Outcome.Communication, (
            "was aborted (SIGABRT), as NCCL's watchdog does after an error or a time-out of a collective; the log "
            "before it says which"
        )
    if number == signal.SIGBUS:
        return Outcome.Internal, "ended with SIGBUS: /dev/shm may be full (resources.shm), or a mapped file was cut"
    if number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE):
        return Outcome.Internal, f"crashed ({signal.Signals(number).name}); the log may hold its stacks"
    return None
