"""Builds PyTorchJobs (training-operator v1) and reads them.

Other modules also depend on this kind: on the meaning of its conditions and events for an attempt, on the objects to
watch, and on the permissions that they need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_api.manifest import API_VERSION, KIND, DPOJob
from dpo_operator import labels, names
from dpo_operator.backend import podpatch
from dpo_operator.backend.launch import FIRST, NEWEST, Launch
from dpo_operator.backend.pod import CONTAINER, pod_template, priority_class, processes
from dpo_operator.backend.volumes import CONTRACT_KEY, IMAGE_KEY, SPEC_FILE
from dpo_operator.config import Settings
from dpo_operator.types import Object

API_GROUP = "kubeflow.org"
CHILD_VERSION = "v1"
CHILD_API_VERSION = f"{API_GROUP}/{CHILD_VERSION}"
CHILD_KIND = "PyTorchJob"
CHILD_PLURAL = "pytorchjobs"

REPLICA_TYPE = "training.kubeflow.org/replica-type"
REPLICA_INDEX = "training.kubeflow.org/replica-index"


@dataclass(frozen=True)
class Identity:
    """The DPOJob that a PyTorchJob belongs to."""

    name: str
    namespace: str | None
    uid: str
    created: int = 0
    """When the DPOJob was created, Unix seconds; 0 offline."""
    queue: str | None = None
    """The Kueue queue in the DPOJob's own label."""
    priority: str | None = None
    """The Kueue priority class in the DPOJob's own label."""
    annotations: tuple[tuple[str, str], ...] = ()
    """The DPOJob's own annotations that its PyTorchJobs get (``labels.copied``)."""


def owner_reference(identity: Identity) -> dict[str, Any]:
    """Return the owner reference by which garbage collection deletes the object; it does not block the DPOJob."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": identity.name,
        "uid": identity.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def object_metadata(identity: Identity, name: str, own_labels: dict[str, str], settings: Settings) -> dict[str, Any]:
    """Return the metadata of an object of a job: labels, namespace and owner."""
    metadata: dict[str, Any] = {"name": name, "labels": {**dict(settings.labels), **own_labels}}
    if identity.namespace is not None:
        metadata["namespace"] = identity.namespace
    if identity.uid:
        metadata["ownerReferences"] = [owner_reference(identity)]
    return metadata


def spec_json(job: DPOJob) -> str:
    """Return the DPOJob as the trainer reads it, without unset fields and without runPolicy, which may change."""
    document = job.to_dict()
    spec = {key: value for key, value in document["spec"].items() if key != "runPolicy"}
    pinned = {
        "apiVersion": document["apiVersion"],
        "kind": document["kind"],
        "metadata": {"name": job.metadata.name},
        "spec": spec,
    }
    return json.dumps(pinned, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n"


def digest(text: str) -> str:
    """Return the digest of a pinned spec, as the status holds it: of exactly these bytes."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def newest_launch(job: DPOJob) -> Launch:
    """Return what a job that this version accepts pins of its command line."""
    return Launch(NEWEST, digest(spec_json(job)))


def build_config_map(
    job: DPOJob, identity: Identity, image: str, settings: Settings, contract: int = NEWEST
) -> dict[str, Any]:
    """Return the immutable ConfigMap that pins what every attempt of a job runs."""
    name = names.config_map(identity.name, identity.uid)
    data = {IMAGE_KEY: image, SPEC_FILE: spec_json(job)}
    if contract != FIRST:  # version 0.1.0 wrote none
        data[CONTRACT_KEY] = str(contract)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": object_metadata(identity, name, labels.of_job(identity.name, identity.uid), settings),
        "immutable": True,
        "data": data,
    }


def pinned_image(config_map: Object) -> str | None:
    """Return the image that a job's ConfigMap pins."""
    image = (config_map.get("data") or {}).get(IMAGE_KEY)
    return image if isinstance(image, str) and image else None


def pinned_spec(config_map: Object) -> str:
    """Return the spec that a job's ConfigMap pins, as it is written there; empty if there is none."""
    text = (config_map.get("data") or {}).get(SPEC_FILE)
    return text if isinstance(text, str) else ""


def pinned_contract(config_map: Object) -> int:
    """Return the contract of the command line that a job's ConfigMap pins."""
    number = str((config_map.get("data") or {}).get(CONTRACT_KEY) or FIRST)
    return int(number) if number.isascii() and number.isdigit() and len(number) < 4 else FIRST


def build_child(
    job: DPOJob,
    identity: Identity,
    attempt: int,
    image: str,
    settings: Settings,
    avoid: Sequence[str] = (),
    launch: Launch | None = None,
) -> dict[str, Any]:
    """Return the PyTorchJob of one attempt: one Master and, for more than one node, the rest as Workers.

    ``launch``: what was pinned of the command line; None for a job that is accepted now.
    """
    spec = job.spec
    launch = launch or newest_launch(job)
    own = labels.of_attempt(identity.name, identity.uid, attempt)

    def replicas(count: int, *, leads: bool) -> dict[str, Any]:
        template = pod_template(
            spec,
            image=image,
            config_map=names.config_map(identity.name, identity.uid),
            labels=own,
            fence=names.fence(identity.created, attempt),
            launch=launch,
            settings=settings,
            leads=leads,
            avoid=avoid,
        )
        template = podpatch.applied(template, settings.trainer_pod_patch)
        return {"replicas": count, "restartPolicy": "Never", "template": template}

    nodes = spec.resources.nodes
    specs = {"Master": replicas(1, leads=True)}
    if nodes > 1:
        specs["Worker"] = replicas(nodes - 1, leads=False)
    policy: dict[str, Any] = {"cleanPodPolicy": "Running"}
    if settings.gang_scheduling:
        policy["schedulingPolicy"] = {"minAvailable": nodes}
        if priority := priority_class(spec, settings):
            policy["schedulingPolicy"]["priorityClass"] = priority
    queueing = _queueing(job, identity, attempt, settings)
    metadata = object_metadata(identity, names.child(identity.name, attempt), {**own, **queueing}, settings)
    if identity.annotations:
        metadata["annotations"] = dict(identity.annotations)
    return {
        "apiVersion": CHILD_API_VERSION,
        "kind": CHILD_KIND,
        "metadata": metadata,
        "spec": {"nprocPerNode": str(processes(spec)), "runPolicy": policy, "pytorchReplicaSpecs": specs},
    }


def likeness(job: DPOJob, identity: Identity, image: str, settings: Settings) -> str:
    """Return a digest that is equal for first PyTorchJobs of one namespace whose pods are alike, as in a sweep.

    They may differ in what no check of the API server is about: the DPOJob's name, UID and age, which are in names,
    labels and the owner, and the trainer's command line.
    """
    child = build_child(job, replace(identity, name="job", uid="", created=0), 1, image, settings)
    for replica in child["spec"]["pytorchReplicaSpecs"].values():
        for container in replica["template"]["spec"]["containers"]:
            if container["name"] == CONTAINER:
                del container["command"]
    return digest(json.dumps(child, sort_keys=True))


def queue_of(job: DPOJob, identity: Identity, settings: Settings) -> str | None:
    """Return the queue of a job's attempts: from the spec, else the DPOJob's own label, else the installation."""
    if not settings.kueue:
        return None
    return job.spec.run_policy.queue_name or identity.queue or settings.default_queue or None


def _queueing(job: DPOJob, identity: Identity, attempt: int, settings: Settings) -> dict[str, str]:
    """Kueue's labels, only on the PyTorchJob: otherwise Kueue would manage the pods one by one."""
    policy, queue = job.spec.run_policy, queue_of(job, identity, settings)
    if queue is None:
        return {}
    priority = policy.priority_class or identity.priority
    if attempt > 1 and policy.restart_priority_class is not None:
        priority = policy.restart_priority_class
    return {labels.KUEUE_QUEUE: queue} | ({labels.KUEUE_PRIORITY: priority} if priority else {})


# -- reading back


def _condition(child: Object, kind: str) -> bool:
    """Whether a condition is True. The order means nothing: after a resume the last one is Suspended=False."""
    conditions: Iterable[Mapping[str, Any]] = (child.get("status") or {}).get("conditions") or ()
    return any(condition.get("type") == kind and condition.get("status") == "True" for condition in conditions)


def has_succeeded(child: Object) -> bool:
    """Whether training-operator reports success, which it does as soon as the master has succeeded."""
    return _condition(child, "Succeeded")


def has_failed(child: Object) -> bool:
    """Whether training-operator reports a failure, which it does when any replica has failed."""
    return _condition(child, "Failed")


def failure_message(child: Object) -> str:
    """Return training-operator's message about a failed PyTorchJob; empty if there is none."""
    for condition in (child.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "Failed" and condition.get("status") == "True":
            return str(condition.get("message") or "")
    return ""


def is_over(child: Object) -> bool:
    """Whether training-operator reports success or failure."""
    return has_succeeded(child) or has_failed(child)


def is_held(child: Object) -> bool:
    """Whether a queue has suspended the PyTorchJob. Only the queue writes this field."""
    return bool(((child.get("spec") or {}).get("runPolicy") or {}).get("suspend"))


def queue_of_child(child: Object) -> str | None:
    """Return the queue that a PyTorchJob waits in or was admitted from; None without one."""
    queue = (child["metadata"].get("labels") or {}).get(labels.KUEUE_QUEUE)
    return str(queue) if queue else None


def is_rank_zero(pod: Object) -> bool:
    """Whether this pod holds rank 0."""
    return (pod["metadata"].get("labels") or {}).get(REPLICA_TYPE) == "master"


def expected_pods(child_name: str, nodes: int) -> list[str]:
    """Return the names of all pods of a PyTorchJob."""
    return [f"{child_name}-master-0", *(f"{child_name}-worker-{index}" for index in range(nodes - 1))]


def trainer_status(pod: Object) -> Mapping[str, Any] | None:
    """Return the status of the trainer's container; None if there is none yet."""
    statuses: Iterable[Mapping[str, Any]] = (pod.get("status") or {}).get("containerStatuses") or ()
    return next((status for status in statuses if status.get("name") == CONTAINER), None)


def trainer_memory_limit(pod: Object) -> str | None:
    """Return the memory limit of the trainer's container; if the job sets none, a LimitRange may have set it."""
    containers: Iterable[Mapping[str, Any]] = (pod.get("spec") or {}).get("containers") or ()
    own: Mapping[str, Any] = next((c for c in containers if c.get("name") == CONTAINER), {})
    limit = ((own.get("resources") or {}).get("limits") or {}).get("memory")
    return str(limit) if limit is not None else None
