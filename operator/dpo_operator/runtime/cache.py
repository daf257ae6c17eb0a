"""The cache: the newest known version of DPOJobs, their PyTorchJobs and their pods.

Watches fill it, the operator's own writes are added at once, and a paged re-list (``watchdog``) repairs it. kopf's
indices are not used, because they keep objects that were deleted while a watch was down.

It holds what a pass needs. Of a DPOJob that is over that is a ``Record``: its PyTorchJobs and pods are not kept, and a
pass over it begins with reading them again (``open``). Pods of attempts that have ended are not kept either.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_operator import housekeeping
from dpo_operator.config import Settings
from dpo_operator.labels import ATTEMPT, JOB, JOB_UID
from dpo_operator.runtime import jobseries, records
from dpo_operator.runtime.records import Record, Sample
from dpo_operator.runtime.resources import CHILDREN, JOBS, PODS, Resource

Key = tuple[str, str]
"""Namespace and name of a DPOJob, the key of the work queue."""

_REMEMBERED_GONE = 20_000

_UNREAD_METADATA = frozenset({"managedFields", "generateName", "selfLink"})
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_UNREAD_OF_PODS = frozenset({*_UNREAD_METADATA, "annotations", "ownerReferences"})
_UNREAD_STATUS_OF_PODS = frozenset({"hostIP", "hostIPs", "podIPs", "qosClass"})


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
    """Names by DPOJob. Of a recorded DPOJob: all of its PyTorchJobs, which are not in ``objects``."""
    seen: dict[str, int] = field(default_factory=dict)
    """By UID, also of objects that are not kept: the version that a watch delivered last. The operator's own writes do
    not count."""


class Cache:
    """The newest known version of every object, by kind and by DPOJob."""

    def __init__(self, settings: Settings | None = None) -> None:
        """Start empty. ``settings``: the operator's, which may give jobs a time to live."""
        self._settings = settings or Settings()
        self._kinds = {resource: _ObjectsOfKind() for resource in (JOBS, CHILDREN, PODS)}
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._departed: dict[Key, dict[str, dict[str, Any]]] = {}
        self._records: dict[Key, Record] = {}
        self._woken: set[Key] = set()
        self._partial: OrderedDict[Key, None] = OrderedDict()

    # -- filling ------------------------------------------------------------------------------------------------------

    def put(self, resource: Resource, item: Mapping[str, Any], *, watched: bool) -> Key | None:
        """Add an object; return the DPOJob to reconcile, or None if no pass needs the object.

        ``watched``: a watch delivered it, as opposed to a request of the operator.
        """
        metadata = item["metadata"]
        key, uid, kind = (metadata["namespace"], metadata["name"]), metadata["uid"], self._kinds[resource]
        if watched:
            kind.seen[uid] = max(version(item), kind.seen.get(uid, 0))
        if uid in self._gone:
            return None
        if resource == JOBS:
            return self._put_job(key, item, watched=watched)
        old = kind.objects.get(key)
        if old is not None and old["metadata"]["uid"] == uid and version(old) >= version(item):
            return None
        job = job_of(resource, item)
        if old is not None:
            del kind.objects[key]
            self._unlink(resource, old)
        if job is None or (resource == PODS and self._is_past(job, item)):
            return None
        if job in self._records:
            return self._put_beside_record(job, resource, item)
        kind.objects[key] = trimmed(resource, item)
        kind.by_job.setdefault(job, set()).add(key[1])
        return job

    def _put_job(self, key: Key, item: Mapping[str, Any], *, watched: bool) -> Key | None:
        uid, objects = item["metadata"]["uid"], self._kinds[JOBS].objects
        old = objects.get(key)
        known = self._records.get(key) or old
        if known is not None:
            known_uid, known_version = _identity(known)
            if known_uid == uid and known_version >= version(item):
                return None
            if known_uid != uid:
                self._mark_partial(key)  # the pods of the older job's attempts may still be there
        elif watched and records.is_at_rest(item):
            self._record(key, item, housekeeping.expiry(item, self._settings))
            return key
        self._drop_record(key)
        objects[key] = trimmed(JOBS, item)
        for pod in self.of_job(PODS, key):
            if self._is_past(key, pod):
                del self._kinds[PODS].objects[key[0], pod["metadata"]["name"]]
                self._unlink(PODS, pod)
        return key

    def _is_past(self, job: Key, pod: Mapping[str, Any]) -> bool:
        """Whether a pod belongs to an attempt whose end is in the status: no pass looks at it again."""
        item = self._kinds[JOBS].objects.get(job)
        labels = pod["metadata"].get("labels") or {}
        if item is None or labels.get(JOB_UID) != item["metadata"]["uid"]:
            return False
        attempts, number = (item.get("status") or {}).get("attempts"), str(labels.get(ATTEMPT))
        if not attempts or not (number.isascii() and number.isdigit()):
            return False
        newest = attempts[-1]
        return int(number) < newest["number"] or (int(number) == newest["number"] and bool(newest.get("endTime")))

    def deleted(self, resource: Resource, item: Mapping[str, Any]) -> Key | None:
        """Remove an object that a watch reports as deleted; return the DPOJob to reconcile.

        A deleted pod is kept until a pass has processed it: it may be the only evidence of how an attempt ended.
        """
        metadata = item["metadata"]
        removed = self.remove(resource, metadata["namespace"], metadata["name"], metadata["uid"])
        key = removed or job_of(resource, item)
        if resource == JOBS or key is None:
            return key
        if key in self._records:
            self._kinds[resource].by_job.get(key, set()).discard(metadata["name"])
            return None
        if resource == PODS:
            if removed is None and self._is_past(key, item):
                return None
            self.depart(key, item)
        return key

    def remove(self, resource: Resource, namespace: str, name: str, uid: str) -> Key | None:
        """Remove a deleted object; return the DPOJob to reconcile. Another object of the same name is kept."""
        kind, key = self._kinds[resource], (namespace, name)
        self._gone[uid] = None
        while len(self._gone) > _REMEMBERED_GONE:
            self._gone.popitem(last=False)
        kind.seen.pop(uid, None)
        record = self._records.get(key) if resource == JOBS else None
        old = kind.objects.get(key)
        if _identity(record or old)[0] != uid:
            return None
        if resource == JOBS:
            self._mark_partial(key)
            self._drop_record(key)
        if old is None:
            return key
        del kind.objects[key]
        self._unlink(resource, old)
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

    def _unlink(self, resource: Resource, old: Mapping[str, Any]) -> None:
        job, kind = job_of(resource, old), self._kinds[resource]
        if job is None or job not in kind.by_job:
            return
        kind.by_job[job].discard(old["metadata"]["name"])
        if not kind.by_job[job]:
            del kind.by_job[job]

    def clear(self, resource: Resource) -> None:
        """Drop all objects of a kind that the cluster no longer serves."""
        self._kinds[resource] = _ObjectsOfKind()
        if resource == JOBS:
            self._records.clear()
            self._woken.clear()

    # -- DPOJobs that are over ----------------------------------------------------------------------------------------

    def settle(
        self, key: Key, job: Mapping[str, Any], children: Sequence[Mapping[str, Any]], expires: float | None
    ) -> bool:
        """Keep only a record of a DPOJob about which a pass found nothing to do; return whether it was recorded.

        ``job`` and ``children``: what the pass decided on. If something newer has arrived, all is kept for the next
        pass. ``expires``: when its time to live is over, Unix seconds.
        """
        item = self.job(key)
        held = [_identity(child) for child in self.of_job(CHILDREN, key)]
        if item is None or _identity(item) != _identity(job) or held != [_identity(child) for child in children]:
            return False
        self._record(key, item, expires)
        self._woken.discard(key)
        return True

    def _record(self, key: Key, item: Mapping[str, Any], expires: float | None) -> None:
        series = tuple(_shared(sample) for sample in jobseries.samples(item, 0.0))
        self._records[key] = records.record_of(item, version=version(item), expires=expires, series=series)
        self._kinds[JOBS].objects.pop(key, None)
        for resource in (CHILDREN, PODS):
            for old in self.of_job(resource, key):
                del self._kinds[resource].objects[key[0], old["metadata"]["name"]]
                if resource == CHILDREN:
                    self._put_beside_record(key, resource, old)
        self._kinds[PODS].by_job.pop(key, None)
        self._departed.pop(key, None)

    def _put_beside_record(self, job: Key, resource: Resource, item: Mapping[str, Any]) -> Key | None:
        """Note an object of a recorded DPOJob; return its key if a pass must look at it."""
        if resource == PODS:
            return None
        names = self._kinds[resource].by_job.setdefault(job, set())
        names.add(item["metadata"]["name"])
        if records.needs_pass(item) or len(names) > self._records[job].children:
            self._woken.add(job)
            return job
        return None

    def _drop_record(self, key: Key) -> None:
        self._woken.discard(key)
        if self._records.pop(key, None) is not None:
            self._kinds[CHILDREN].by_job.pop(key, None)
            self._mark_partial(key)

    def _mark_partial(self, key: Key) -> None:
        self._partial[key] = None
        while len(self._partial) > _REMEMBERED_GONE:
            self._partial.popitem(last=False)

    def record(self, key: Key) -> Record | None:
        """Return the record of a DPOJob of which no more is kept."""
        return self._records.get(key)

    def is_woken(self, key: Key) -> bool:
        """Whether a recorded DPOJob needs a pass before its time to live is over."""
        return key in self._woken

    def is_partial(self, key: Key) -> bool:
        """Whether a DPOJob may have PyTorchJobs and pods that are not kept: a pass has to read them first."""
        return key in self._records or (key in self._partial and key in self._kinds[JOBS].objects)

    def open(self, key: Key, job: Mapping[str, Any]) -> None:
        """Keep a DPOJob whole again. Then its PyTorchJobs and pods are read, and ``complete`` is called."""
        self._drop_record(key)
        self.put(JOBS, job, watched=False)

    def complete(self, key: Key) -> None:
        """Note that all PyTorchJobs and pods of a DPOJob are kept."""
        if key not in self._records:
            self._partial.pop(key, None)

    # -- reading ------------------------------------------------------------------------------------------------------

    def job(self, key: Key) -> dict[str, Any] | None:
        """Return a DPOJob; None if there is none, or only its record."""
        return self._kinds[JOBS].objects.get(key)

    def of_job(self, resource: Resource, key: Key) -> list[dict[str, Any]]:
        """Return a DPOJob's PyTorchJobs or pods, by name."""
        kind = self._kinds[resource]
        names = [(key[0], name) for name in sorted(kind.by_job.get(key, ()))]
        return [kind.objects[name] for name in names if name in kind.objects]

    def uids(self, resource: Resource, key: Key) -> set[str]:
        """Return the UIDs of a DPOJob's PyTorchJobs or pods."""
        return {item["metadata"]["uid"] for item in self.of_job(resource, key)}

    def jobs(self) -> Iterator[dict[str, Any] | Record]:
        """Yield all DPOJobs: those that are over as records."""
        yield from list(self._kinds[JOBS].objects.values())
        yield from list(self._records.values())

    def job_keys(self) -> list[Key]:
        """Return the keys of all DPOJobs."""
        return [*self._kinds[JOBS].objects, *self._records]

    def seen(self, resource: Resource, uid: str) -> int:
        """Return the version of an object that a watch last delivered; 0 if none."""
        return self._kinds[resource].seen.get(uid, 0)

    def uid(self, resource: Resource, key: Key) -> str | None:
        """Return the UID of the object of a name, if it is kept or recorded."""
        record = self._records.get(key) if resource == JOBS else None
        return _identity(record or self._kinds[resource].objects.get(key))[0] or None

    def known(self, resource: Resource) -> dict[Key, str]:
        """Return name and UID of every object of a kind that is kept or recorded."""
        found = {key: item["metadata"]["uid"] for key, item in self._kinds[resource].objects.items()}
        if resource == JOBS:
            found |= {key: record.uid for key, record in self._records.items()}
        return found

    def unkept(self, resource: Resource) -> set[str]:
        """Return the UIDs of objects that watches have delivered and that are not kept."""
        kept = {item["metadata"]["uid"] for item in self._kinds[resource].objects.values()}
        if resource == JOBS:
            kept |= {record.uid for record in self._records.values()}
        return self._kinds[resource].seen.keys() - kept

    def forget(self, resource: Resource, uids: Iterable[str]) -> None:
        """Forget objects that are not kept and that the cluster no longer has."""
        for uid in uids:
            self._kinds[resource].seen.pop(uid, None)


def _identity(item: Mapping[str, Any] | Record | None) -> tuple[str, int]:
    """Return UID and version."""
    if item is None:
        return "", 0
    if isinstance(item, Record):
        return item.uid, item.version
    return item["metadata"]["uid"], version(item)


def _shared(sample: Sample) -> Sample:
    """Return a sample that equal ones share where few values are possible."""
    return _flag(*sample) if sample[1] else sample


@functools.lru_cache(maxsize=256)
def _flag(name: str, label: str, value: float) -> Sample:
    return (name, label, value)


def trimmed(resource: Resource, item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object without the parts that the operator does not read, which are most of its bytes."""
    unread = _UNREAD_OF_PODS if resource == PODS else _UNREAD_METADATA
    metadata = {name: value for name, value in item["metadata"].items() if name not in unread}
    annotations = metadata.get("annotations")
    if annotations and _LAST_APPLIED in annotations:
        metadata["annotations"] = {name: value for name, value in annotations.items() if name != _LAST_APPLIED}
    kept = {**item, "metadata": metadata}
    spec = item.get("spec") or {}
    if resource == PODS:
        kept["spec"] = {name: spec[name] for name in ("nodeName", "terminationGracePeriodSeconds") if name in spec}
        kept["spec"]["containers"] = [_container(c) for c in spec.get("containers") or []]
        kept["spec"]["initContainers"] = [
            {name: c[name] for name in ("name", "image", "restartPolicy") if name in c}
            for c in spec.get("initContainers") or []
        ]
        if "status" in item:
            status = item["status"] or {}
            kept["status"] = {name: value for name, value in status.items() if name not in _UNREAD_STATUS_OF_PODS}
    elif resource == CHILDREN:
        replicas = spec.get("pytorchReplicaSpecs") or {}
        bare = {role: {k: v for k, v in replica.items() if k != "template"} for role, replica in replicas.items()}
        kept["spec"] = {**spec, "pytorchReplicaSpecs": bare}
    shared: dict[str, Any] = _with_shared_names(kept)
    return shared


def _with_shared_names(value: Any) -> Any:
    """Return a copy whose field names are the same strings in every object: each event has its own copies of them."""
    if isinstance(value, dict):
        return {sys.intern(name): _with_shared_names(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_shared_names(inner) for inner in value]
    return value


def _container(container: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name and memory limit of a container; the limit explains an out-of-memory kill."""
    limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    return {"name": container["name"]} | ({"resources": {"limits": {"memory": limit}}} if limit is not None else {})
