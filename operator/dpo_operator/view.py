"""The facts of one pass: the observed objects, read once and sorted by attempt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dpo_api.findings import ManifestError
from dpo_api.manifest import DPOJob, parse_job
from dpo_api.spec import DPOJobSpec
from dpo_api.status import Attempt, DPOJobStatus
from dpo_operator import clock, labels
from dpo_operator.backend import pytorchjob
from dpo_operator.backend.pytorchjob import Identity
from dpo_operator.types import Object, Observed


def moment(text: object) -> float | None:
    """Return a Kubernetes time as Unix seconds; None where there is none."""
    return clock.to_moment(text) if isinstance(text, str) and text else None


def attempt_of(thing: Object) -> int | None:
    """Return the attempt that an object's label names."""
    value = (thing["metadata"].get("labels") or {}).get(labels.ATTEMPT, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 8 else None


def owner_uid(thing: Object) -> str | None:
    """Return the UID of an object's controller."""
    owners = thing["metadata"].get("ownerReferences") or []
    return next((str(owner.get("uid")) for owner in owners if owner.get("controller")), None)


def is_alive(pod: Object) -> bool:
    """Whether a pod may still run something: neither of its final phases."""
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


@dataclass(frozen=True)
class View:
    """What a pass knows."""

    observed: Observed
    status: DPOJobStatus
    """The stored status."""

    @classmethod
    def of(cls, observed: Observed) -> View:
        """Parse the stored status. Raises ValidationError for one that no operator wrote."""
        return cls(observed, DPOJobStatus.model_validate(observed.job.get("status") or {}))

    @cached_property
    def metadata(self) -> Mapping[str, object]:
        """Metadata of the DPOJob."""
        metadata: Mapping[str, object] = self.observed.job["metadata"]
        return metadata

    @cached_property
    def name(self) -> str:
        """Name of the DPOJob."""
        return str(self.metadata["name"])

    @cached_property
    def uid(self) -> str:
        """UID of the DPOJob."""
        return str(self.metadata["uid"])

    @cached_property
    def generation(self) -> int:
        """Generation of the spec."""
        return int(str(self.metadata.get("generation") or 1))

    @cached_property
    def job(self) -> DPOJob:
        """The DPOJob, validated. Raises ManifestError."""
        return parse_job(self.observed.job, stored=True)

    @property
    def spec(self) -> DPOJobSpec:
        """Its spec. Raises ManifestError."""
        return self.job.spec

    @cached_property
    def is_readable(self) -> bool:
        """Whether this operator can read the spec."""
        try:
            return bool(self.job)
        except ManifestError:
            return False

    @cached_property
    def identity(self) -> Identity:
        """What links PyTorchJobs to the job."""
        metadata = self.observed.job["metadata"]
        own: Mapping[str, str] = metadata.get("labels") or {}
        return Identity(
            name=self.name,
            namespace=str(self.metadata["namespace"]) if self.metadata.get("namespace") else None,
            uid=self.uid,
            created=int(moment(self.metadata.get("creationTimestamp")) or 0),
            queue=own.get(labels.KUEUE_QUEUE),
            priority=own.get(labels.KUEUE_PRIORITY),
            annotations=labels.copied(metadata.get("annotations") or {}),
        )

    @cached_property
    def children(self) -> dict[str, Object]:
        """The job's own PyTorchJobs by name."""
        return {str(c["metadata"]["name"]): c for c in self.observed.children if owner_uid(c) == self.uid}

    @cached_property
    def strangers(self) -> dict[str, Object]:
        """PyTorchJobs that have the job's label, or the name of an attempt, but another owner."""
        return {str(c["metadata"]["name"]): c for c in self.observed.children if owner_uid(c) != self.uid}

    def is_gone(self, child: str) -> bool:
        """Whether a request, not only the cache, has shown that one of the job's PyTorchJobs no longer exists."""
        return child in self.observed.absent or child in self.strangers

    def pods(self, attempt: Attempt) -> Sequence[Object]:
        """Return an attempt's pods, rank 0's first."""
        return self._pods.get(attempt.number, ())

    @cached_property
    def _pods(self) -> dict[int, list[Object]]:
        """The job's own pods by attempt. A pass asks for them often, and a job may have a thousand."""
        found: dict[int, list[Object]] = {}
        for pod in self.observed.pods:
            number = attempt_of(pod)
            if number is not None and (pod["metadata"].get("labels") or {}).get(labels.JOB_UID) == self.uid:
                found.setdefault(number, []).append(pod)
        for pods in found.values():
            pods.sort(key=lambda pod: (not pytorchjob.is_rank_zero(pod), str(pod["metadata"]["name"])))
        return found

    @cached_property
    def namesake_pods(self) -> list[Object]:
        """Pods of a deleted DPOJob of the same name that have not ended yet."""
        return [
            pod
            for pod in self.observed.pods
            if (pod["metadata"].get("labels") or {}).get(labels.JOB_UID) not in (self.uid, None)
        ]

    def stored_attempt(self, number: int) -> Attempt | None:
        """Return an attempt from the stored status, without the changes of this pass."""
        return next((attempt for attempt in self.status.attempts if attempt.number == number), None)
