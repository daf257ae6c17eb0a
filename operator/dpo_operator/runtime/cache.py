"""The cache: the newest known version of DPOJobs, their PyTorchJobs and their pods.

Watches fill it, the operator's own writes are added at once, and a paged re-list (``watchdog``) repairs it. kopf's
indices are not used, because they keep objects that were deleted while a watch was down.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_operator.labels import JOB
from dpo_operator.runtime.resources import CHILDREN, JOBS, PODS, Resource

Key = tuple[str, str]
"""Namespace and name of a DPOJob, the key of the work queue."""

_REMEMBERED_GONE = 20_000


def version(item: Mapping[str, Any]) -> int:
    """Return an object's resourceVersion as a number: versions of one kind grow."""
    try:
        return int(item["metadata"].get("resourceVersion") or 0)
    except ValueError:
        return 0


def job_of(resource: Resource, item: Mapping[str, Any]) -> Key | None:
    """Return the key of the DPOJob that an object is or belongs to; None for any other object."""
    metadata = item["metadata"]
    if resource == JOBS:
        return metadata["namespace"], metadata["name"]
    name = (metadata.get("labels") or {}).get(JOB)
    return (metadata["namespace"], name) if name else None


@dataclass
class _ObjectsOfKind:
    """All objects of one kind."""

    objects: dict[Key, dict[str, Any]] = field(default_factory=dict)
    by_job: dict[Key, set[str]] = field(default_factory=dict)
    seen: dict[Key, tuple[str, int]] = field(default_factory=dict)
    """By object: the UID and version that a watch delivered last. The operator's own writes do not count."""


class Cache:
    """The newest known version of every object, by kind and by DPOJob."""

    def __init__(self) -> None:
        """Start empty."""
        self._kinds = {resource: _ObjectsOfKind() for resource in (JOBS, CHILDREN, PODS)}
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._departed: dict[Key, dict[str, dict[str, Any]]] = {}

    # -- filling ------------------------------------------------------------------------------------------------------

    def put(self, resource: Resource, item: Mapping[str, Any], *, watched: bool) -> Key | None:
        """Add an object; return the DPOJob to reconcile, or None if the object is outdated or belongs to no DPOJob.

        ``watched``: a watch delivered it, as opposed to a request of the operator.
        """
        metadata = item["metadata"]
        key, uid, kind = (metadata["namespace"], metadata["name"]), metadata["uid"], self._kinds[resource]
        if watched:
            self._note_seen(kind, key, uid, version(item))
        if uid in self._gone:
            return None
        old = kind.objects.get(key)
        if old is not None and old["metadata"]["uid"] == uid and version(old) >= version(item):
            return None
        job = job_of(resource, item)
        if old is not None:
            self._unlink(resource, kind, old)
        if job is None:
            kind.objects.pop(key, None)
            return None
        kind.objects[key] = trimmed(resource, item)
        kind.by_job.setdefault(job, set()).add(key[1])
        return job

    @staticmethod
    def _note_seen(kind: _ObjectsOfKind, key: Key, uid: str, number: int) -> None:
        known = kind.seen.get(key)
        if known is None or known[0] != uid or known[1] < number:
            kind.seen[key] = (uid, number)

    def remove(self, resource: Resource, namespace: str, name: str, uid: str) -> Key | None:
        """Remove a deleted object; return the DPOJob to reconcile. Another object of the same name is kept."""
        kind, key = self._kinds[resource], (namespace, name)
        self._gone[uid] = None
        while len(self._gone) > _REMEMBERED_GONE:
            self._gone.popitem(last=False)
        if kind.seen.get(key, ("", 0))[0] == uid:
            del kind.seen[key]
        old = kind.objects.get(key)
        if old is None or old["metadata"]["uid"] != uid:
            return None
        del kind.objects[key]
        self._unlink(resource, kind, old)
        return job_of(resource, old)

    def replace(
        self, resource: Resource, job: Key, items: Sequence[Mapping[str, Any]], *, before: Collection[str]
    ) -> None:
        """Replace a DPOJob's PyTorchJobs or pods by what the cluster lists.

        ``before``: the UIDs that ``uids`` returned before the list was requested. What a watch delivered since then may
        be newer than the list, and is kept.
        """
        listed = {item["metadata"]["uid"] for item in items}
        for old in self.of_job(resource, job):
            if old["metadata"]["uid"] in before and old["metadata"]["uid"] not in listed:
                self.remove(resource, job[0], old["metadata"]["name"], old["metadata"]["uid"])
        for item in items:
            self.put(resource, item, watched=False)

    def depart(self, job: Key, pod: Mapping[str, Any]) -> None:
        """Keep a deleted pod until a pass has processed it: it may have been created and deleted between two passes."""
        kept = trimmed(PODS, pod)
        status = kept.get("status") or {}
        if status.get("phase") not in {"Succeeded", "Failed"}:
            kept["status"] = {**status, "phase": "Failed"}  # it is deleted, so none of its containers runs
        self._departed.setdefault(job, {})[kept["metadata"]["uid"]] = kept

    def departed(self, job: Key) -> list[dict[str, Any]]:
        """Return a DPOJob's pods that were deleted and not yet processed."""
        return list(self._departed.get(job, {}).values())

    def processed(self, job: Key, pods: Iterable[Mapping[str, Any]]) -> None:
        """Drop deleted pods that a pass has processed."""
        kept = self._departed.get(job, {})
        for pod in pods:
            kept.pop(pod["metadata"]["uid"], None)
        if not kept:
            self._departed.pop(job, None)

    @staticmethod
    def _unlink(resource: Resource, kind: _ObjectsOfKind, old: Mapping[str, Any]) -> None:
        job = job_of(resource, old)
        names = kind.by_job.get(job) if job is not None else None
        if job is not None and names is not None:
            names.discard(old["metadata"]["name"])
            if not names:
                del kind.by_job[job]

    def clear(self, resource: Resource) -> None:
        """Drop all objects of a kind that the cluster no longer serves."""
        self._kinds[resource] = _ObjectsOfKind()

    # -- reading ------------------------------------------------------------------------------------------------------

    def job(self, key: Key) -> dict[str, Any] | None:
        """Return a DPOJob."""
        return self._kinds[JOBS].objects.get(key)

    def of_job(self, resource: Resource, key: Key) -> list[dict[str, Any]]:
        """Return a DPOJob's PyTorchJobs or pods, by name."""
        kind = self._kinds[resource]
        return [kind.objects[key[0], name] for name in sorted(kind.by_job.get(key, ()))]

    def uids(self, resource: Resource, key: Key) -> set[str]:
        """Return the UIDs of a DPOJob's PyTorchJobs or pods."""
        return {item["metadata"]["uid"] for item in self.of_job(resource, key)}

    def jobs(self) -> Iterator[dict[str, Any]]:
        """Yield all DPOJobs."""
        yield from list(self._kinds[JOBS].objects.values())

    def job_keys(self) -> list[Key]:
        """Return the keys of all DPOJobs."""
        return list(self._kinds[JOBS].objects)

    def seen(self, resource: Resource, namespace: str, name: str) -> tuple[str, int]:
        """Return UID and version that a watch last delivered under a name; ("", 0) if none."""
        return self._kinds[resource].seen.get((namespace, name), ("", 0))

    def known(self, resource: Resource) -> dict[Key, str]:
        """Return name and UID of every object of a kind."""
        return {key: item["metadata"]["uid"] for key, item in self._kinds[resource].objects.items()}


def trimmed(resource: Resource, item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object without the parts that the operator does not read, which are most of its bytes."""
    metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
    kept = {**item, "metadata": metadata}
    spec = item.get("spec") or {}
    if resource == PODS:
        kept["spec"] = {name: spec[name] for name in ("nodeName", "terminationGracePeriodSeconds") if name in spec}
        kept["spec"]["containers"] = [_container(c) for c in spec.get("containers") or []]
        kept["spec"]["initContainers"] = [
            {name: c[name] for name in ("name", "image", "restartPolicy") if name in c}
            for c in spec.get("initContainers") or []
        ]
    elif resource == CHILDREN:
        replicas = spec.get("pytorchReplicaSpecs") or {}
        bare = {role: {k: v for k, v in replica.items() if k != "template"} for role, replica in replicas.items()}
        kept["spec"] = {**spec, "pytorchReplicaSpecs": bare}
    return kept


def _container(container: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name and memory limit of a container; the limit explains an out-of-memory kill."""
    limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    return {"name": container["name"]} | ({"resources": {"limits": {"memory": limit}}} if limit is not None else {})
