"""Ends a process when its parent dies. Imports little, so that a process can call it before its slow imports."""

import ctypes
import signal
from contextlib import suppress


def follow_parent(parent_signal: int = signal.SIGTERM) -> None:
    """Ask the kernel to send this signal when the parent dies, so that a killed launcher leaves no process behind."""
    with suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(parent_signal))
