"""Labels and annotations of everything that the operator creates."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_api.manifest import GROUP

JOB = f"{GROUP}/job"
JOB_UID = f"{GROUP}/job-uid"
ATTEMPT = f"{GROUP}/attempt"
RETRY = f"{GROUP}/retry"
"""Annotation of a DPOJob: a new value retries a job that failed."""
METRICS = f"{GROUP}/metrics"
"""On a pod that serves its metrics by HTTPS, with the value ``HTTPS``. Pods that serve plain HTTP do not have it."""
HTTPS = "https"
MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "dpo-operator"

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"

COPIED_ANNOTATIONS = ("provreq.kueue.x-k8s.io/",)
"""Prefixes of a DPOJob's annotations that its PyTorchJobs get: Kueue passes them to a ProvisioningRequest."""


def copied(annotations: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the annotations of a DPOJob that its PyTorchJobs get."""
    return tuple((key, annotations[key]) for key in sorted(annotations) if key.startswith(COPIED_ANNOTATIONS))


def of_job(name: str, uid: str) -> dict[str, str]:
    """Return the labels that identify an object's DPOJob; a job that is only rendered has no UID."""
    return {JOB: name} | ({JOB_UID: uid} if uid else {}) | {MANAGED_BY: MANAGER}


def of_attempt(name: str, uid: str, attempt: int) -> dict[str, str]:
    """Return the labels of one attempt's PyTorchJob and pods."""
    return {**of_job(name, uid), ATTEMPT: str(attempt)}
