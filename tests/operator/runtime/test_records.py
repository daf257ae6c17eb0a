"""A DPOJob that is over is a small record, and whatever happens to it brings its objects back."""

from __future__ import annotations

import copy
import gc
import json
import sys
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_operator import clock
from dpo_operator.config import Settings
from dpo_operator.runtime import jobseries
from dpo_operator.runtime.cache import Cache, Key
from dpo_operator.runtime.records import Record
from dpo_operator.runtime.resources import CHILDREN, JOBS, PODS
from dpo_testing.simcluster import SimCluster, manifest

Object = dict[str, Any]

KEY: Key = ("team", "job")


def finished(**run_policy: Any) -> tuple[Object, Object, list[Object]]:
    """A job of 8 pods that has succeeded with all metrics, its PyTorchJob and its pods, as the API server has them."""
    cluster = SimCluster(manifest(resources={"nodes": 8, "gpusPerNode": 8, "memory": "1Gi"}, runPolicy=run_policy))
    cluster.run_to("Running")
    metrics = {f"train/m{index}": 0.1234567 for index in range(25)} | {"train/loss": 0.5, "train/acc": 0.75}
    cluster.say(step=99, last_checkpoint_step=90, metrics=metrics)
    cluster.settle()
    for name in list(cluster.pods):
        cluster.end_pod(name, Outcome.Succeeded, step=100, total=100, model_uri="s3://r/m", metrics=metrics)
    cluster.settle()
    assert cluster.state == "Succeeded"
    job: Object = json.loads(json.dumps(cluster.job))
    job["status"]["message"] = "x" * 4000
    job["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "x" * 20_000}
    (child,) = cluster.children.values()
    found = json.loads(json.dumps([child, *cluster.pods.values()]))
    for item in (job, *found):
        item["metadata"] |= {"namespace": "team", "resourceVersion": "7", "managedFields": [{"much": "text" * 500}]}
    return job, found[0], found[1:]


def copies(number: int, job: Object, child: Object, pods: list[Object]) -> tuple[Object, Object, list[Object]]:
    """The same objects under other names, as another list brings them: nothing is shared."""
    job, child, *pods = json.loads(json.dumps([job, child, *pods]))
    for index, item in enumerate((job, child, *pods)):
        metadata = item["metadata"]
        metadata["uid"] = f"{number:08}-0000-4000-8000-{index:012}"
        metadata["name"] += f"-{number}"
        labels = metadata.get("labels") or {}
        if "dpo-operator.dev/job" in labels:
            labels["dpo-operator.dev/job"] = job["metadata"]["name"]
            labels["dpo-operator.dev/job-uid"] = job["metadata"]["uid"]
    return job, child, pods


def fill(cache: Cache, job: Object, child: Object, pods: list[Object]) -> None:
    cache.put(JOBS, job, watched=True)
    cache.put(CHILDREN, child, watched=True)
    for pod in pods:
        cache.put(PODS, pod, watched=True)


def recorded(**run_policy: Any) -> tuple[Cache, Object, Object, list[Object]]:
    cache, (job, child, pods) = Cache(), finished(**run_policy)
    fill(cache, job, child, pods)
    assert cache.record(KEY) is not None
    assert not cache.is_woken(KEY)
    return cache, job, child, pods


def bytes_of(thing: object, known: set[int]) -> int:
    """Bytes of everything that is reachable and not known."""
    total, left = 0, [thing]
    while left:
        one = left.pop()
        if id(one) in known or isinstance(one, type) or type(one).__name__ == "module":
            continue
        known.add(id(one))
        total += sys.getsizeof(one)
        left += [*one.keys(), *one.values()] if isinstance(one, dict) else gc.get_referents(one)
    return total


def test_a_finished_job_of_eight_pods_takes_four_kib_and_its_pods_a_note_each() -> None:
    """Job, PyTorchJob and all that finds them again: the mean of many, since hash tables grow in leaps."""
    cache, things, jobs = Cache(), finished(), 200
    for number in range(jobs):
        job, child, pods = copies(number, *things)
        fill(cache, job, child, [])
    of_jobs = bytes_of(cache, set()) / jobs
    for number in range(jobs):
        _, _, pods = copies(number, *things)
        for pod in pods:
            cache.put(PODS, pod, watched=True)
    of_pods = bytes_of(cache, set()) / jobs - of_jobs
    assert of_jobs < 4096
    assert of_pods < 8 * 256


def test_a_record_counts_and_shows_what_the_job_did() -> None:
    cache, job, _, _ = recorded()
    (record,) = cache.jobs()
    assert isinstance(record, Record)
    now = clock.to_moment("2030-01-01T00:00:00Z")

    def shown(of: Any) -> list[Any]:
        return [family.samples for family in (*jobseries.of_fleet([of]), *jobseries.of_jobs([of], now))]

    assert shown(record) == shown(job)
    younger = copy.deepcopy(job)
    younger["metadata"]["creationTimestamp"] = "2030-01-01T00:00:00Z"
    assert jobseries.foremost([record, younger], 1) == [younger]


def test_its_pods_and_its_ended_child_need_no_pass_and_a_held_child_does() -> None:
    """A PyTorchJob that its queue holds would run when it is admitted."""
    cache, _, child, pods = recorded()
    pods[0]["metadata"]["resourceVersion"] = child["metadata"]["resourceVersion"] = "8"
    assert cache.put(PODS, pods[0], watched=True) is None
    assert cache.put(CHILDREN, child, watched=True) is None
    assert cache.deleted(PODS, pods[0]) is None
    assert cache.departed(KEY) == []
    child["metadata"]["resourceVersion"] = "9"
    child["status"] = {}
    child["spec"]["runPolicy"]["suspend"] = True
    assert cache.put(CHILDREN, child, watched=True) == KEY
    assert cache.is_woken(KEY)


@pytest.mark.parametrize("children_first", [False, True])
def test_a_history_that_was_not_trimmed_needs_a_pass(children_first: bool) -> None:
    """The operator may have been killed between the end of the job and the deletion."""
    cache, (job, child, _) = Cache(), finished(attemptsHistoryLimit=0)
    other = copy.deepcopy(child)
    other["metadata"] |= {"name": "job-0", "uid": "other"}
    order = [(CHILDREN, child), (CHILDREN, other)]
    order.insert(2 if children_first else 0, (JOBS, job))
    for resource, item in order:
        cache.put(resource, item, watched=True)
    assert cache.record(KEY) is not None
    assert cache.is_woken(KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 2},
        {"annotations": {"dpo-operator.dev/retry": "1"}},
        {"deletionTimestamp": "2030-01-01T00:00:00Z"},
        {"labels": {"team": "b"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_newer_version_brings_the_whole_object_back(change: Object) -> None:
    cache, job, child, pods = recorded()
    assert cache.put(JOBS, job, watched=True) is None, "nothing is new"
    job["metadata"] |= {"resourceVersion": "8", **change}
    assert cache.put(JOBS, job, watched=True) == KEY
    assert cache.record(KEY) is None
    assert cache.is_partial(KEY), "the pass has to read what belongs to it"
    kept = cache.job(KEY)
    assert kept is not None
    assert kept["spec"] == job["spec"]
    assert kept["status"] == job["status"]
    cache.open(KEY, job)
    cache.replace(CHILDREN, KEY, [child], before=set())
    cache.replace(PODS, KEY, pods, before=set())
    cache.complete(KEY)
    assert not cache.is_partial(KEY)
    assert [item["metadata"]["uid"] for item in cache.of_job(CHILDREN, KEY)] == [child["metadata"]["uid"]]


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"generation": 99}},
        {"metadata": {"annotations": {"dpo-operator.dev/retry": "1"}}},
        {"metadata": {"deletionTimestamp": "2030-01-01T00:00:00Z"}},
        {"status": {"state": "Rejected"}},
        {"status": {"completionTime": None}},
    ],
    ids=str,
)
def test_a_job_that_a_pass_may_have_to_serve_is_listed_whole(change: dict[str, Object]) -> None:
    """After a restart: an edit or a retry that the last process did not see, or a rejection by another version."""
    cache, (job, _, _) = Cache(), finished()
    for part, values in change.items():
        job[part] |= values
    assert cache.put(JOBS, job, watched=True) == KEY
    assert cache.record(KEY) is None
    assert cache.job(KEY) is not None


def test_a_pass_settles_only_what_it_has_seen() -> None:
    cache, (job, child, _) = Cache(), finished()
    cache.put(JOBS, job, watched=False)
    cache.put(CHILDREN, child, watched=False)
    seen = (cache.job(KEY) or {}, cache.of_job(CHILDREN, KEY))
    newer = copy.deepcopy(child)
    newer["metadata"]["resourceVersion"] = "8"
    cache.put(CHILDREN, newer, watched=True)
    assert not cache.settle(KEY, *seen, None), "the child has changed since"
    assert cache.job(KEY) is not None
    assert cache.settle(KEY, seen[0], cache.of_job(CHILDREN, KEY), 5.0)
    record = cache.record(KEY)
    assert record is not None
    assert record.expires == 5.0
    assert cache.job(KEY) is None
    assert cache.of_job(CHILDREN, KEY) == []


def test_its_time_to_live_is_known_from_the_list() -> None:
    cache, job, _, _ = recorded(ttlSecondsAfterFinished=60)
    record = cache.record(KEY)
    assert record is not None
    ended = clock.to_moment(job["status"]["completionTime"])
    assert record.expires == ended + 60
    cache = Cache(Settings(default_ttl_seconds_after_finished=30))
    del job["spec"]["runPolicy"]["ttlSecondsAfterFinished"]
    cache.put(JOBS, job, watched=True)
    record = cache.record(KEY)
    assert record is not None
    assert record.expires == ended + 30


def test_pods_of_an_ended_attempt_are_not_kept_and_those_of_the_next_are() -> None:
    cache, (job, _, pods) = Cache(), finished()
    del job["status"]["completionTime"]
    ended = job["status"]["attempts"][0].pop("endTime")
    fill(cache, job, {**pods[0], "metadata": {**pods[0]["metadata"], "name": "x", "uid": "x", "labels": {}}}, pods)
    assert len(cache.of_job(PODS, KEY)) == 8
    job["status"]["attempts"][0]["endTime"] = ended
    job["metadata"]["resourceVersion"] = "8"
    cache.put(JOBS, job, watched=True)
    assert cache.of_job(PODS, KEY) == []
    late, following = copy.deepcopy(pods[0]), copy.deepcopy(pods[0])
    late["metadata"]["resourceVersion"] = "9"
    assert cache.put(PODS, late, watched=True) is None
    following["metadata"] |= {"name": "job-2-master-0", "uid": "f"}
    following["metadata"]["labels"]["dpo-operator.dev/attempt"] = "2"
    assert cache.put(PODS, following, watched=True) == KEY
    assert [pod["metadata"]["name"] for pod in cache.of_job(PODS, KEY)] == ["job-2-master-0"]


def test_a_job_of_the_same_name_reads_what_the_deleted_one_has_left() -> None:
    """Its pods may still be there, and no attempt may run beside them."""
    cache, job, _, _ = recorded()
    assert cache.deleted(JOBS, job) == KEY
    assert list(cache.jobs()) == []
    again = copy.deepcopy(job)
    again["metadata"] |= {"uid": "again", "resourceVersion": "9"}
    again["status"] = {}
    assert cache.put(JOBS, again, watched=True) == KEY
    assert cache.is_partial(KEY)


def test_what_the_cluster_no_longer_has_is_forgotten() -> None:
    cache, job, child, pods = recorded()
    assert cache.known(JOBS) == {KEY: job["metadata"]["uid"]}
    gone = cache.unkept(PODS)
    assert gone == {pod["metadata"]["uid"] for pod in pods}
    cache.forget(PODS, gone)
    assert cache.unkept(PODS) == set()
    assert cache.unkept(CHILDREN) == {child["metadata"]["uid"]}
