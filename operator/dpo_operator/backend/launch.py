"""The trainer's command line: a contract with an image that may be older than the operator.

A job keeps the contract under which it was accepted, as it keeps its image: a flag that the image does not know would
end the job. To change the command line, add a contract with its golden file in tests/golden/launch; never change one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dpo_api.spec import DPOJobSpec
from dpo_operator.backend.volumes import SPEC_FILE, SPEC_FOLDER
from dpo_operator.config import Settings

PREFIX = ("python", "-m", "dpo_trainer", "launch")
"""How every contract begins. The chart's admission policy checks it."""
TERMINATION_LOG = "/dev/termination-log"

FIRST = 1
"""Contract of jobs whose status and ConfigMap name none: version 0.1.0 accepted them."""


@dataclass(frozen=True)
class Launch:
    """What is pinned of a job's command line."""

    contract: int
    spec_digest: str | None = None
    """Digest of the pinned spec, which the trainer compares with its file; the first contract has none."""


def _first(spec: DPOJobSpec, fence: int, settings: Settings, _launch: Launch) -> list[str]:
    words = [*PREFIX, "--spec", f"{SPEC_FOLDER}/{SPEC_FILE}"]
    words += ["--run-dir", str(spec.checkpoint.uri), "--attempt", str(fence), "--last-words", TERMINATION_LOG]
    words += ["--processes", str(spec.resources.processes()), "--port", str(settings.trainer_port)]
    return [*words, "--grace-seconds", str(spec.checkpoint.grace_period_seconds)]


def _second(spec: DPOJobSpec, fence: int, settings: Settings, launch: Launch) -> list[str]:
    """The first one, and the digest of the spec."""
    return [*_first(spec, fence, settings, launch), "--spec-digest", str(launch.spec_digest)]


CONTRACTS: Mapping[int, Callable[[DPOJobSpec, int, Settings, Launch], list[str]]] = {FIRST: _first, 2: _second}

NEWEST = max(CONTRACTS)
"""Contract of the jobs that this version accepts."""


def command(spec: DPOJobSpec, fence: int, settings: Settings, launch: Launch) -> list[str]:
    """Return the trainer's command line. ``fence`` orders this attempt among all that use the run directory.

    Raises KeyError for a contract that this version does not know.
    """
    return CONTRACTS[launch.contract](spec, fence, settings, launch)
