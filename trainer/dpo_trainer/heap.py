"""The heap of the C library, which holds all tensors on CPUs and what is read from files."""

import ctypes


def trim() -> None:
    """Give free pages back to the system. glibc keeps most of them, for each thread that has allocated some.

    It takes milliseconds, and pages that are used again cost a fault each: for the end of a phase, not of a step.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # None: not glibc
    if release is not None:
        release(0)
