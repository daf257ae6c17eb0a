"""Names of the objects that the operator creates. They are deterministic, so that a repeated create gives 409."""

from __future__ import annotations

import hashlib

ATTEMPT_LIMIT = 1_000_000


def child(job: str, attempt: int) -> str:
    """Return the name of an attempt's PyTorchJob: ``<job>-<attempt>``."""
    return f"{job}-{attempt}"


def config_map(job: str, uid: str) -> str:
    """Return the name of the ConfigMap that pins a job. It has the UID, since a recreated job is a different one."""
    return f"{job}-spec-{_digest(uid)[:8]}" if uid else f"{job}-spec"


def network_policy(job: str, uid: str, rules: str) -> str:
    """Return the name of a job's NetworkPolicy. ``rules``: its spec as text; other rules give another name."""
    return f"{job}-network-{_digest(f'{uid}/{rules}')[:8]}" if uid else f"{job}-network"


def event(job: str, uid: str, reason: str, detail: str) -> str:
    """Return the name of an event: the same for the same transition, so that it is created once."""
    return f"{job}.{_digest(f'{uid}/{reason}/{detail}')[:16]}"


def fence(created: int, attempt: int) -> int:
    """Return the number that orders attempts in a run directory, of this job and of earlier jobs of the same name.

    ``created``: when the DPOJob was created, Unix seconds; 0 if it is only rendered. A job that is deleted and created
    again starts at attempt 1, but its number is higher than that of every attempt of the deleted job.
    """
    return created * ATTEMPT_LIMIT + attempt


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
