"""The cache: newest version wins, deletions stick, and a name used again is another object."""

from __future__ import annotations

import asyncio
from typing import Any

import kopf
from aiohttp import web
from aiohttp.test_utils import TestServer

from dpo_operator.runtime.cache import Cache
from dpo_operator.runtime.client import Client
from dpo_operator.runtime.resources import CHILDREN, JOBS, PODS
from dpo_operator.runtime.worker import relist


def item(name: str, version: int, uid: str = "u1", job: str | None = "job", **more: Any) -> dict[str, Any]:
    labels = {"dpo-operator.dev/job": job} if job else {}
    metadata = {"namespace": "ns", "name": name, "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"metadata": {**metadata, "managedFields": [{"much": "text"}]}, **more}


def test_an_older_version_changes_nothing() -> None:
    cache = Cache()
    assert cache.put(JOBS, item("job", 5, status={"state": "Running"}), watched=False) == ("ns", "job")
    # 10 is newer than 9: versions are numbers, not words.
    assert cache.put(JOBS, item("job", 4, status={"state": "Pending"}), watched=True) is None
    assert cache.put(JOBS, item("job", 10), watched=True) == ("ns", "job")
    assert cache.put(JOBS, item("job", 9), watched=True) is None
    found = cache.job(("ns", "job"))
    assert found is not None
    assert found["metadata"]["resourceVersion"] == "10"
    assert "managedFields" not in found["metadata"]


def test_what_is_gone_does_not_come_back_by_a_late_answer() -> None:
    cache = Cache()
    cache.put(CHILDREN, item("job-1", 3), watched=True)
    assert cache.remove(CHILDREN, "ns", "job-1", "u1") == ("ns", "job")
    assert cache.put(CHILDREN, item("job-1", 2), watched=False) is None
    assert cache.of_job(CHILDREN, ("ns", "job")) == []
    # Another object of the same name is another object.
    assert cache.put(CHILDREN, item("job-1", 4, uid="u2"), watched=True) == ("ns", "job")
    assert cache.remove(CHILDREN, "ns", "job-1", "u1") is None
    assert [c["metadata"]["uid"] for c in cache.of_job(CHILDREN, ("ns", "job"))] == ["u2"]


def test_objects_are_found_by_their_job_and_follow_its_label() -> None:
    cache = Cache()
    for name in ("b", "a"):
        cache.put(PODS, item(name, 1, uid=name), watched=True)
    assert [p["metadata"]["name"] for p in cache.of_job(PODS, ("ns", "job"))] == ["a", "b"]
    assert cache.of_job(PODS, ("other", "job")) == []
    cache.put(PODS, item("a", 2, uid="a", job="other"), watched=True)
    assert [p["metadata"]["name"] for p in cache.of_job(PODS, ("ns", "job"))] == ["b"]
    assert [p["metadata"]["name"] for p in cache.of_job(PODS, ("ns", "other"))] == ["a"]
    assert cache.put(PODS, item("a", 3, uid="a", job=None), watched=True) is None
    assert cache.of_job(PODS, ("ns", "other")) == []


def test_only_watches_count_as_seen() -> None:
    cache = Cache()
    cache.put(JOBS, item("job", 7), watched=False)
    assert cache.seen(JOBS, "u1") == 0
    cache.put(JOBS, item("job", 7), watched=True)
    assert cache.seen(JOBS, "u1") == 7


def test_pods_and_children_are_kept_without_what_nobody_reads() -> None:
    cache = Cache()
    memory = {"limits": {"memory": "4Gi"}}
    limited = {"name": "pytorch", "image": "i", "env": [1], "resources": {**memory, "requests": {"memory": "1Gi"}}}
    spec = {"nodeName": "n", "containers": [limited, {"name": "other", "image": "i"}], "volumes": [1]}
    cache.put(PODS, item("p", 1, spec=spec), watched=True)
    (pod,) = cache.of_job(PODS, ("ns", "job"))
    kept = [{"name": "pytorch", "resources": memory}, {"name": "other"}]
    assert pod["spec"] == {"nodeName": "n", "containers": kept, "initContainers": []}
    assert spec["volumes"] == [1]  # the event's own object is not touched


def test_a_pod_that_came_and_went_between_two_passes_is_processed_once() -> None:
    cache = Cache()
    status = {"phase": "Running", "conditions": [{"type": "DisruptionTarget", "status": "True"}]}
    cache.depart(("ns", "job"), item("p", 3, uid="p", status=status))
    (pod,) = cache.departed(("ns", "job"))
    assert pod["status"] == {**status, "phase": "Failed"}  # nothing of it runs any more
    cache.processed(("ns", "job"), [pod])
    assert cache.departed(("ns", "job")) == []


def test_what_a_watch_brings_while_a_list_is_under_way_stays() -> None:
    """The list is older than that pod and says nothing about it; what it lacks of what was known before is gone."""
    cache, key = Cache(), ("ns", "job")
    for name in ("kept", "gone"):
        cache.put(PODS, item(name, 1, uid=name), watched=True)

    async def answer(_: web.Request) -> web.Response:
        cache.put(PODS, item("young", 5, uid="young"), watched=True)
        return web.json_response({"items": [item("kept", 3, uid="kept"), item("unseen", 2, uid="unseen")]})

    async def look() -> None:
        server = web.Application()
        server.router.add_get("/api/v1/namespaces/ns/pods", answer)
        async with TestServer(server) as served:
            client = Client(lambda: kopf.ConnectionInfo(server=str(served.make_url("/"))), user_agent="test")
            await relist(client, cache, PODS, key)
            await client.close()

    asyncio.run(look())
    assert [pod["metadata"]["name"] for pod in cache.of_job(PODS, key)] == ["kept", "unseen", "young"]
    assert cache.put(PODS, item("young", 6, uid="young"), watched=True) == key, "its later events are heard"
    assert cache.put(PODS, item("gone", 2, uid="gone"), watched=True) is None
