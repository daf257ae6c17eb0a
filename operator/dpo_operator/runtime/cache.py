"""What the process has seen of the cluster: DPOJobs, their children and their pods, newest version of each.

Watches fill it, the operator's own writes are put in at once, and a paged re-list (``watchdog``) repairs it. kopf's
indices are not used, because they keep what was deleted while a watch was down.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_operator.labels import JOB
from dpo_operator.runtime.resources import CHILDREN, JOBS, PODS, Resource

Key = tuple[str, str]
"""Namespace and name of a DPOJob: what is worked on."""

_REMEMBERED_GONE = 20_000


def version(item: Mapping[str, Any]) -> int:
    """Return an object's resourceVersion as a number: versions of one kind grow."""
    try:
        return int(item["metadata"].get("resourceVersion") or 0)
    except ValueError:
        return 0


def job_of(resource: Resource, item: Mapping[str, Any]) -> Key | None:
    """Return the key of the DPOJob that an object is or belongs to; None for a stranger's object."""
    metadata = item["metadata"]
    if resource == JOBS:
        return metadata["namespace"], metadata["name"]
    name = (metadata.get("labels") or {}).get(JOB)
    return (metadata["namespace"], name) if name else None


@dataclass
class _Shelf:
    """All objects of one kind."""

    objects: dict[Key, dict[str, Any]] = field(default_factory=dict)
    by_job: dict[Key, set[str]] = field(default_factory=dict)
    seen: dict[Key, tuple[str, int]] = field(default_factory=dict)
    """By object: UID and version that a watch, not a write of ours, has brought."""


class Cache:
    """The newest known version of every object, by kind and by DPOJob."""

    def __init__(self) -> None:
        """Start empty."""
        self._shelves = {resource: _Shelf() for resource in (JOBS, CHILDREN, PODS)}
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._departed: dict[Key, dict[str, dict[str, Any]]] = {}

    # -- filling ------------------------------------------------------------------------------------------------------

    def put(self, resource: Resource, item: Mapping[str, Any], *, watched: bool) -> Key | None:
        """Take an object in; return the DPOJob to look at, or None if the object is old or a stranger's.

        ``watched``: a watch brought it, as opposed to a request of ours.
        """
        metadata = item["metadata"]
        key, uid, shelf = (metadata["namespace"], metadata["name"]), metadata["uid"], self._shelves[resource]
        if watched:
            self._note_seen(shelf, key, uid, version(item))
        if uid in self._gone:
            return None
        old = shelf.objects.get(key)
        if old is not None and old["metadata"]["uid"] == uid and version(old) >= version(item):
            return None
        job = job_of(resource, item)
        if old is not None:
            self._unlink(resource, shelf, old)
        if job is None:
            shelf.objects.pop(key, None)
            return None
        shelf.objects[key] = trimmed(resource, item)
        shelf.by_job.setdefault(job, set()).add(key[1])
        return job

    @staticmethod
    def _note_seen(shelf: _Shelf, key: Key, uid: str, number: int) -> None:
        known = shelf.seen.get(key)
        if known is None or known[0] != uid or known[1] < number:
            shelf.seen[key] = (uid, number)

    def remove(self, resource: Resource, namespace: str, name: str, uid: str) -> Key | None:
        """Forget an object that is gone; return the DPOJob to look at. Another object of its name stays."""
        shelf, key = self._shelves[resource], (namespace, name)
        self._gone[uid] = None
        while len(self._gone) > _REMEMBERED_GONE:
            self._gone.popitem(last=False)
        if shelf.seen.get(key, ("", 0))[0] == uid:
            del shelf.seen[key]
        old = shelf.objects.get(key)
        if old is None or old["metadata"]["uid"] != uid:
            return None
        del shelf.objects[key]
        self._unlink(resource, shelf, old)
        return job_of(resource, old)

    def replace(
        self, resource: Resource, job: Key, items: Sequence[Mapping[str, Any]], *, before: Collection[str]
    ) -> None:
        """Take in all that the cluster has of a DPOJob's children or pods; forget what it has no more.

        ``before``: the UIDs that ``uids`` gave before the list was asked for. What a watch brought since then may be
        younger than the list, which says nothing about it.
        """
        listed = {item["metadata"]["uid"] for item in items}
        for old in self.of_job(resource, job):
            if old["metadata"]["uid"] in before and old["metadata"]["uid"] not in listed:
                self.remove(resource, job[0], old["metadata"]["name"], old["metadata"]["uid"])
        for item in items:
            self.put(resource, item, watched=False)

    def depart(self, job: Key, pod: Mapping[str, Any]) -> None:
        """Keep a deleted pod's last words until a pass has heard them: it may have come and gone between two passes."""
        kept = trimmed(PODS, pod)
        status = kept.get("status") or {}
        if status.get("phase") not in {"Succeeded", "Failed"}:
            kept["status"] = {**status, "phase": "Failed"}  # it is gone, so nothing of it runs
        self._departed.setdefault(job, {})[kept["metadata"]["uid"]] = kept

    def departed(self, job: Key) -> list[dict[str, Any]]:
        """Return a DPOJob's pods that were deleted since ``heard`` was called."""
        return list(self._departed.get(job, {}).values())

    def heard(self, job: Key, pods: Iterable[Mapping[str, Any]]) -> None:
        """Forget departed pods that a pass has taken into the status."""
        kept = self._departed.get(job, {})
        for pod in pods:
            kept.pop(pod["metadata"]["uid"], None)
        if not kept:
            self._departed.pop(job, None)

    @staticmethod
    def _unlink(resource: Resource, shelf: _Shelf, old: Mapping[str, Any]) -> None:
        job = job_of(resource, old)
        names = shelf.by_job.get(job) if job is not None else None
        if job is not None and names is not None:
            names.discard(old["metadata"]["name"])
            if not names:
                del shelf.by_job[job]

    def clear(self, resource: Resource) -> None:
        """Forget all objects of a kind that the cluster no longer knows."""
        self._shelves[resource] = _Shelf()

    # -- reading ------------------------------------------------------------------------------------------------------

    def job(self, key: Key) -> dict[str, Any] | None:
        """Return a DPOJob."""
        return self._shelves[JOBS].objects.get(key)

    def of_job(self, resource: Resource, key: Key) -> list[dict[str, Any]]:
        """Return a DPOJob's children or pods, by name."""
        shelf = self._shelves[resource]
        return [shelf.objects[key[0], name] for name in sorted(shelf.by_job.get(key, ()))]

    def uids(self, resource: Resource, key: Key) -> set[str]:
        """Return the UIDs of a DPOJob's children or pods."""
        return {item["metadata"]["uid"] for item in self.of_job(resource, key)}

    def jobs(self) -> Iterator[dict[str, Any]]:
        """Yield all DPOJobs."""
        yield from list(self._shelves[JOBS].objects.values())

    def job_keys(self) -> list[Key]:
        """Return the keys of all DPOJobs."""
        return list(self._shelves[JOBS].objects)

    def seen(self, resource: Resource, namespace: str, name: str) -> tuple[str, int]:
        """Return UID and version of what a watch last brought under a name; ("", 0) if nothing."""
        return self._shelves[resource].seen.get((namespace, name), ("", 0))

    def known(self, resource: Resource) -> dict[Key, str]:
        """Return name and UID of every object of a kind."""
        return {key: item["metadata"]["uid"] for key, item in self._shelves[resource].objects.items()}


def trimmed(resource: Resource, item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object without the parts that nobody here reads: they are most of its bytes."""
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
    """Return name and memory limit of a container: of one that is killed for its memory the limit tells whose fault."""
    limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    return {"name": container["name"]} | ({"resources": {"limits": {"memory": limit}}} if limit is not None else {})
