"""A process that does what its argument says: `python -m dpo_testing.probe ACTION [...]`. For tests of preloaded."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def _environment() -> dict[str, str]:
    """Return all variables but those of a locale, which an interpreter may set as it starts."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LC_")}


def _describe(*words: str) -> None:
    """Print what this process was started with, as JSON, and a line to stderr."""
    facts: dict[str, Any] = {
        "name": __name__,
        "argv": sys.argv,
        "words": words,
        "cwd": os.getcwd(),  # noqa: PTH109 - as the kernel says it
        "environment": _environment(),
        "input": sys.stdin.read(),
        "own session": os.getsid(0) == os.getpid(),
    }
    print(json.dumps(facts))
    print("a line of stderr", file=sys.stderr)


def _sleep(*words: str) -> None:
    """Print the process's and its parent's id, then sleep. ``follow``: end when the parent dies."""
    if "follow" in words:
        from dpo_trainer.parent import follow_parent

        follow_parent()
    print(os.getpid(), os.getppid(), flush=True)
    time.sleep(60)


def _handle() -> None:
    """Exit with code 9 on SIGTERM and 8 on SIGINT, the latter through Python's own handler."""

    def handler(_number: int, _frame: Any) -> None:
        raise SystemExit(9)

    signal.signal(signal.SIGTERM, handler)
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(8)


def _start(*words: str) -> None:
    """Start another probe, wait for it and print the exit code that this process sees."""
    child = subprocess.Popen([sys.executable, "-m", "dpo_testing.probe", *words])
    print(child.wait(), flush=True)


def _exit(how: str) -> None:
    """End in one of the ways that Python code can end."""
    if how == "error":
        raise ValueError("a deliberate error")
    if how.startswith("signal "):
        os.kill(os.getpid(), int(how.split()[1]))
    if how == "message":
        sys.exit("a last message")
    if how == "none":
        sys.exit()
    sys.exit(int(how))


_ACTIONS: dict[str, Callable[..., None]] = {
    "describe": _describe,
    "exit": _exit,
    "handle": _handle,
    "sleep": _sleep,
    "start": _start,
}

if __name__ == "__main__":
    _ACTIONS[sys.argv[1]](*sys.argv[2:])
