"""What the cache keeps of a DPOJob that is over: a few values instead of the objects.

Finished jobs stay in the cluster for weeks, and there are many more of them than of running ones. A pass over one of
them reads the objects again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_api.manifest import GROUP
from dpo_api.running import RunPolicy
from dpo_operator.backend import pytorchjob

Sample = tuple[str, str, float]
"""Name of a series, the value of its label beside namespace and name (empty: it has none), and its value."""

_HISTORY_LIMIT = RunPolicy.model_fields["attempts_history_limit"].default


@dataclass(frozen=True, slots=True)
class Record:
    """A DPOJob that is over, and about which nothing is to do before ``expires``."""

    namespace: str
    name: str
    uid: str
    version: int
    created: str
    state: str
    expires: float | None
    """When its time to live is over, Unix seconds; None: never."""
    children: int
    """Number of its PyTorchJobs that may be kept; more mean that the history was not trimmed."""
    series: tuple[Sample, ...]


def record_of(job: Mapping[str, Any], *, version: int, expires: float | None, series: tuple[Sample, ...]) -> Record:
    """Return the record of a finished DPOJob."""
    metadata, status = job["metadata"], job["status"]
    state = sys.intern(str(status.get("state") or "Failed"))
    policy = _policy(job)
    limit = policy.get("attemptsHistoryLimit", _HISTORY_LIMIT)
    return Record(
        namespace=sys.intern(metadata["namespace"]),
        name=metadata["name"],
        uid=metadata["uid"],
        version=version,
        created=metadata.get("creationTimestamp") or "",
        state=state,
        expires=expires,
        children=limit + (state == "Succeeded") if isinstance(limit, int) else 0,
        series=series,
    )


def is_at_rest(job: Mapping[str, Any]) -> bool:
    """Whether the status of a DPOJob shows that it is over and that a pass has seen it as it is now.

    An annotation of this group may be a request, such as that of a retry: only a pass can tell whether it was served.
    And what another version of the operator rejected may be valid for this version.
    """
    metadata, status = job["metadata"], job.get("status") or {}
    if not status.get("completionTime") or metadata.get("deletionTimestamp"):
        return False
    if status.get("observedGeneration") != metadata.get("generation") or status.get("state") == "Rejected":
        return False
    attempts = status.get("attempts") or ()
    if attempts and not attempts[-1].get("endTime"):
        return False
    return not any(name.partition("/")[0] == GROUP for name in metadata.get("annotations") or ())


def needs_pass(child: Mapping[str, Any]) -> bool:
    """Whether a finished DPOJob's PyTorchJob needs a pass: one that a queue holds would run when it is admitted."""
    if child["metadata"].get("deletionTimestamp"):
        return False
    return pytorchjob.is_held(child) and not pytorchjob.is_over(child)


def _policy(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return runPolicy; the spec of a rejected job may contain anything."""
    spec = job.get("spec")
    policy = spec.get("runPolicy") if isinstance(spec, Mapping) else None
    return policy if isinstance(policy, Mapping) else {}
