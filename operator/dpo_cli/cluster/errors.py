"""Errors of the cluster, and how this program was started. Light: `dpo --help` imports it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

NO_RESOURCE = 'the server doesn\'t have a resource type "dpojobs"'


_FINAL = re.compile(r"error: |Error from server \((NotFound|Forbidden|Unauthorized|BadRequest|Invalid|NotAcceptable)\)")
"""How errors start that waiting does not change."""


class ClusterError(Exception):
    """A request failed. The message is kubectl's own, or has its form; the exit code is kubectl's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """Store the message, which may have several lines, and the exit code."""
        super().__init__(message)
        self.exit_code = exit_code

    @property
    def is_final(self) -> bool:
        """Whether the same request would fail again. A server that is away, restarting or busy may answer later."""
        return _FINAL.match(str(self)) is not None


def failure(message: str, code: int) -> ClusterError:
    """Return the error for kubectl's own message."""
    text = message.strip() or f"error: kubectl failed (exit code {code})"
    if NO_RESOURCE in text:
        text += "; is dpo-operator installed on this cluster?"
    return ClusterError(text, code if code > 0 else 1)


def program() -> str:
    """Return what the user typed to start this program: dpo, or kubectl dpo for the plugin."""
    return "kubectl dpo" if Path(sys.argv[0]).name.startswith("kubectl-") else "dpo"
