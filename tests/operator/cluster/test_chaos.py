"""The operator is killed, misled and doubled; jobs must not notice more than a delay."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from dpo_operator.runtime.client import ApiError as ClientError
from dpo_operator.runtime.performer import is_too_large
from dpo_testing.chaosproxy import Call, ChaosProxy, Fault, nth, once
from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import CONFIGMAPS, DPOJOBS, PYTORCHJOBS, ApiError, eventually
from dpo_testing.operatorprocess import OperatorProcess

DONE = last_words("Succeeded", step=4, total=4, runDir="s3://runs/job/", modelUri="s3://runs/job/model/")

_MOMENTS = re.compile(
    r'"[0-9]{4}-[0-9-]+T[0-9:.]+Z"|"resourceVersion": "[0-9]+"|"(?:admitted|starting)Seconds": [0-9]+'
)


@pytest.fixture
def proxy(cluster: ControlPlane) -> Iterator[ChaosProxy]:
    with ChaosProxy(cluster.url, cluster.tls()) as made:
        yield made


@contextmanager
def serving(cluster: ControlPlane, proxy: ChaosProxy, namespace: str, *flags: str) -> Iterator[OperatorProcess]:
    """Run an operator that sees the cluster through the proxy."""
    kubeconfig = cluster.identity("admin", ["system:masters"], server=proxy.url)
    with OperatorProcess(kubeconfig, "--scrape-by=off", *flags, namespaces=namespace) as process:
        yield process
        assert process.exceptions() == []


@pytest.mark.parametrize(
    "fault", ["refused", *(pytest.param(fault, marks=pytest.mark.nightly) for fault in ("throttled", "slow"))]
)
def test_events_that_cannot_be_read_cost_nothing_but_words(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str, fault: str
) -> None:
    """A pod waits on its node, so that its events are due. The job still does what its user says."""
    jobs, over, asked = Jobs(cluster.admin, namespace), threading.Event(), threading.Event()

    def hang() -> None:
        over.wait(60)

    faults = {
        "refused": Fault(403),
        "throttled": Fault(429, {"Retry-After": "1"}),
        "slow": Fault(before=hang),
    }

    def rule(call: Call) -> Fault | None:
        if call.method != "GET" or not call.path.endswith("/events"):
            return None
        asked.set()
        return faults[fault]

    proxy.rules.append(rule)
    kubelet.hold(namespace)
    try:
        with serving(cluster, proxy, namespace):
            jobs.create(manifest("mute"))
            for number in (1, 2):
                jobs.wait_child(f"mute-{number}")
                eventually(lambda number=number: f"mute-{number}-master-0" in jobs.pods(), what="a pod")  # type: ignore[misc]
                kubelet.creating(namespace, f"mute-{number}-master-0")
                assert asked.wait(60), "its events are due"
                jobs.wait_state("Starting", name="mute")  # until then it may still be Suspended from before
                jobs.patch("mute", {"runPolicy": {"suspend": True}})
                jobs.wait_state("Suspended", name="mute")
                jobs.patch("mute", {"runPolicy": {"suspend": False}})
            jobs.wait_child("mute-3")
    finally:
        over.set()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        pytest.param(413, "Request entity too large: limit is 3145728", marks=pytest.mark.nightly),
        (500, "etcdserver: request is too large"),
    ],
)
def test_a_status_that_is_refused_for_its_size_is_written_smaller(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str, status: int, message: str
) -> None:
    jobs, refused = Jobs(cluster.admin, namespace), threading.Event()

    def rule(call: Call) -> Fault | None:
        if call.kind != "PATCH dpojobs/status" or len(call.body) < 4000:
            return None
        refused.set()
        return Fault(status, message=message)

    proxy.rules.append(rule)
    with serving(cluster, proxy, namespace):
        jobs.create(manifest("large"))
        kubelet.finish(namespace, "large-1-master-0", last_words("Communication", message="lost a peer " * 120), 75)
        jobs.wait_child("large-2")
        assert refused.is_set()
        kubelet.finish(namespace, "large-2-master-0", DONE)
        done = jobs.wait_state("Succeeded", name="large")
    assert [(a["number"], a["result"]) for a in done["attempts"]] == [(1, "Failed"), (2, "Succeeded")]


def test_etcd_refuses_a_large_object_in_the_words_that_the_operator_knows(
    cluster: ControlPlane, namespace: str
) -> None:
    """No operator serves this namespace."""
    jobs = Jobs(cluster.admin, namespace)
    jobs.create(manifest("huge"))
    pods = [{"name": f"pod-{i}", "node": "n" * 250, "reason": "R" * 250} for i in range(64)]
    wide = [{"number": n + 1, "child": f"huge-{n}", "message": "m" * 4000, "pods": pods} for n in range(128)]
    cluster.admin.patch(DPOJOBS, namespace, "huge", {"status": {"attempts": wide[:20]}}, sub="status")
    with pytest.raises(ApiError) as refused:
        cluster.admin.patch(DPOJOBS, namespace, "huge", {"status": {"attempts": wide}}, sub="status")
    assert is_too_large(ClientError(refused.value.status, refused.value.reason, refused.value.message)), refused


def live(jobs: Jobs, kubelet: FakeKubelet, name: str, step: Callable[[Callable[[], object]], object]) -> None:
    """Lead a job through a restart, a suspension and its end. ``step`` waits for what the operator should do."""
    jobs.create(manifest(name, run_policy={"maxRestarts": 1, "ttlSecondsAfterFinished": 3600}))
    step(lambda: f"{name}-1" in jobs.children())
    kubelet.finish(jobs.namespace, f"{name}-1-master-0", last_words("Communication", message="lost a peer"), 75)
    step(lambda: f"{name}-2" in jobs.children())
    kubelet.pod(jobs.namespace, f"{name}-2-master-0")
    step(lambda: jobs.status(name).get("state") == "Running")
    jobs.patch(name, {"runPolicy": {"suspend": True}})
    step(lambda: jobs.status(name).get("state") == "Suspended")
    jobs.patch(name, {"runPolicy": {"suspend": False}})
    step(lambda: f"{name}-3" in jobs.children())
    kubelet.finish(jobs.namespace, f"{name}-3-master-0", DONE)
    step(lambda: jobs.status(name).get("state") == "Succeeded")


def check(jobs: Jobs, proxy: ChaosProxy, name: str) -> None:
    """Whatever happened: one child an attempt, the right budgets, no further writes once it is over."""
    status = jobs.status(name)
    assert [(a["number"], a["result"]) for a in status["attempts"]] == [
        (1, "Failed"), (2, "Stopped"), (3, "Succeeded"),
    ]  # fmt: skip
    assert status["chargedRestarts"] == 1
    truths = {kind: condition["status"] for kind, condition in jobs.conditions(name).items()}
    last = {"Suspended": "False", "Finished": "True", "Succeeded": "True", "Failed": "False"}
    assert truths | last == truths
    made = Counter(json.loads(call.body)["metadata"]["name"] for call in proxy.calls if call.kind == "POST pytorchjobs")
    assert made == {f"{name}-{n}": 1 for n in (1, 2, 3)}
    pods = [p for p in jobs.pods().values() if p["status"].get("phase") == "Running"]
    assert pods == []
    events = Counter((event["reason"], event["message"]) for event in jobs.events_about(name))
    assert set(events.values()) == {1}, events
    assert {"PyTorchJobCreated", "TrainingStarted", "Communication", "Restarting", "Suspended", "Resumed",
            "Succeeded"} <= {reason for reason, _ in events}  # fmt: skip


def owned(jobs: Jobs, name: str) -> set[str]:
    """Return the names of a job's children, pods and ConfigMap."""
    things = [*jobs.children().values(), *jobs.pods().values(), *jobs.api.list(CONFIGMAPS, jobs.namespace)]
    return {thing["metadata"]["name"] for thing in things if thing["metadata"]["name"].startswith(f"{name}-")}


def bounded(proxy: ChaosProxy, most: int) -> None:
    """The mutating calls of a test, refused and failed ones too, are ``most`` at most: about twice of what was seen.

    A calm life makes some thirty. It finds a pass that brings about the next, and a write that is repeated in haste.
    """
    assert len(proxy.tried) <= most, Counter(call.kind for call in proxy.tried)


def expire(jobs: Jobs, name: str, step: Callable[[Callable[[], object]], object]) -> None:
    """End the time to live of a finished job now: it is deleted with all that it owns, and never started again."""
    jobs.patch(name, {"runPolicy": {"ttlSecondsAfterFinished": 0}})
    step(lambda: jobs.api.find(DPOJOBS, jobs.namespace, name) is None)
    step(lambda: not owned(jobs, name))
    assert Counter(event["reason"] for event in jobs.events_about(name))["Expired"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "every", [pytest.param(False, id="first of a kind"), pytest.param(True, id="every", marks=pytest.mark.nightly)]
)
def test_a_kill_before_or_after_any_write_leaves_one_child_an_attempt(
    every: bool, cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str
) -> None:
    """First an undisturbed life is written down; then each of its writes in turn is the moment of a SIGKILL.

    every: each write; else the first of each kind.
    """
    jobs = Jobs(cluster.admin, namespace)

    def calmly(done: Callable[[], object]) -> None:
        eventually(done, seconds=60, what="a step of a calm life")

    with serving(cluster, proxy, namespace):
        live(jobs, kubelet, "calm", calmly)
        check(jobs, proxy, "calm")
        expire(jobs, "calm", calmly)
    writes = [call.kind for call in proxy.calls]
    assert {"POST configmaps", "POST pytorchjobs", "DELETE pytorchjobs", "PATCH dpojobs/status",
            "DELETE dpojobs"} <= set(writes)  # fmt: skip
    # The two lives share nothing, so they are led at the same time.
    with ThreadPoolExecutor(2) as pool:
        lives = [
            pool.submit(_life_with_kills, cluster, kubelet, when, writes, every=every) for when in ("before", "after")
        ]
        for life in lives:
            life.result()


def _life_with_kills(cluster: ControlPlane, kubelet: FakeKubelet, when: str, writes: list[str], *, every: bool) -> None:
    name = f"killed-{when}"
    with cluster.namespace() as namespace, ChaosProxy(cluster.url, cluster.tls()) as proxy:
        jobs = Jobs(cluster.admin, namespace)
        with serving(cluster, proxy, namespace) as operator:

            def step(done: Callable[[], object]) -> None:
                def look() -> object:
                    if not operator.running:
                        operator.start()
                    return done()

                eventually(look, seconds=120, what=f"a step of a life with kills {when} its writes")

            kills: list[str] = []
            proxy.rules[:] = [_kill_at_each_new_write(operator, when, kills, every=every)]
            live(jobs, kubelet, name, step)
            # Let it meet the kills of the last writes too, and settle.
            step(lambda: operator.get("/readyz")[0] == 200)
            check(jobs, proxy, name)
            # The operator that comes after the delete finds nothing to do.
            expire(jobs, name, step)
            step(lambda: operator.get("/readyz")[0] == 200)
            # Some writes of the calm life are one here, as time passes between two looks; none of its kinds is missing.
            assert set(kills) >= set(writes) - {"POST events"}
            assert (Counter(kills)["POST pytorchjobs"], Counter(kills)["DELETE dpojobs"]) == (3 if every else 1, 1)
            done = Counter(call.kind for call in proxy.calls)
            assert (done["POST pytorchjobs"], done["DELETE dpojobs"]) == (3, 1)
            # The number of status writes depends on what each look finds. A pass that brings about the next would show.
            assert len(proxy.calls) <= 2 * len(writes), done


def _kill_at_each_new_write(
    operator: OperatorProcess, when: str, kills: list[str], *, every: bool
) -> Callable[[Call], Fault | None]:
    seen: set[tuple[str, str]] = set()

    def rule(call: Call) -> Fault | None:
        if not call.mutating or (when == "before" and call.kind == "POST events"):
            return None  # before an event is after what comes before it
        # The same write comes again with another time and version, and must not be the end for ever.
        identity = (call.kind, _MOMENTS.sub("", call.body.decode()) if every else "")
        if identity in seen:
            return None
        seen.add(identity)
        kills.append(call.kind)
        return Fault(before=operator.kill) if when == "before" else Fault(after=operator.kill)

    return rule


def test_errors_of_the_api_server_delay_and_nothing_more(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str
) -> None:
    jobs = Jobs(cluster.admin, namespace)
    with serving(cluster, proxy, namespace) as operator:
        proxy.rules[:] = [
            *(once(_is("POST pytorchjobs"), Fault(status=code)) for code in (429, 500, 503)),
            *(once(_is("PATCH dpojobs/status"), Fault(status=code)) for code in (409, 500, 503)),
            nth(3, lambda call: call.kind == "PATCH dpojobs/status", Fault(status=429, headers={"Retry-After": "1"})),
            once(_is("DELETE pytorchjobs"), Fault(status=503)),
            once(_is("POST configmaps"), Fault(after=lambda: None)),  # carried out, and the answer lost
            once(lambda call: call.watch and "pods" in call.path, Fault(status=410)),
            once(lambda call: call.watch and "dpojobs" in call.path, Fault(status=500)),
        ]
        proxy.drop_watches()
        live(jobs, kubelet, "errors", lambda done: eventually(done, seconds=90, what="a step despite errors") and None)
        check(jobs, proxy, "errors")
        eventually(lambda: operator.get("/healthz")[0] == 200, what="all watches are back")
        bounded(proxy, 100)


def _is(kind: str) -> Callable[[Call], bool]:
    return lambda call: call.kind == kind and "dryRun" not in call.query


RELIST_LATER = "--relist-seconds=3600"
"""Leaves the operator to its watches: no comparison with the cluster makes good what they miss."""


@pytest.mark.parametrize("status", [410, pytest.param(404, marks=pytest.mark.nightly)])
def test_watches_that_end_permanently_are_restarted(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str, status: int
) -> None:
    """kopf gives up all watches at such an answer, and cannot always end itself: it is abandoned and restarted."""
    jobs = Jobs(cluster.admin, namespace)
    with serving(cluster, proxy, namespace, RELIST_LATER) as operator:
        jobs.create(manifest("restarted"))
        kubelet.pod(namespace, "restarted-1-master-0")
        jobs.wait_state("Running", name="restarted")
        for plural in ("pods", "pytorchjobs", "dpojobs"):
            before = operator.metric("dpo_operator_watch_restarts")
            proxy.rules[:] = [once(lambda call, p=plural: call.watch and p in call.path, Fault(status=status))]  # type: ignore[misc]
            proxy.drop_watches()
            eventually(
                lambda b=before: operator.metric("dpo_operator_watch_restarts") > b,  # type: ignore[misc]
                what=f"the watches are restarted after the end of that of {plural}",
            )
        # Each watch has to bring something now: the end of the pod and of the child, and a new job.
        kubelet.finish(namespace, "restarted-1-master-0", DONE)
        jobs.wait_state("Succeeded", name="restarted")
        jobs.create(manifest("later"))
        jobs.wait_child("later-1")
        assert operator.get("/healthz")[0] == 200
        bounded(proxy, 30)


def test_dropped_and_hung_watches_are_noticed_and_repaired(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str
) -> None:
    jobs = Jobs(cluster.admin, namespace)
    with serving(cluster, proxy, namespace) as operator:
        jobs.create(manifest("watched"))
        jobs.wait_child("watched-1")
        proxy.drop_watches()
        kubelet.finish(namespace, "watched-1-master-0", DONE)
        jobs.wait_state("Succeeded", name="watched")
        assert operator.get("/healthz")[0] == 200

        # A hung watch delivers nothing: the re-list finds what it missed, and the watches are restarted.
        proxy.mute.set()
        jobs.create(manifest("missed"))
        jobs.wait_child("missed-1")
        kubelet.finish(namespace, "missed-1-master-0", DONE)
        jobs.wait_state("Succeeded", name="missed", seconds=60)
        eventually(lambda: operator.metric("dpo_operator_watch_restarts") >= 1, what="the hung watches are dropped")
        proxy.mute.clear()
        eventually(lambda: operator.get("/healthz")[0] == 200, what="the watches are back")

        # Where a new beginning does not help either, liveness fails: the watches get no answer, all others do.
        proxy.rules[:] = [lambda call: Fault(status=503) if "kopf" in call.agent else None]
        proxy.drop_watches()
        jobs.create(manifest("missed-too"))
        jobs.wait_child("missed-too-1")

        def liveness_fails() -> bool:
            proxy.drop_watches()  # one that was being opened when the rule came is answered
            return operator.get("/healthz")[0] == 503

        eventually(liveness_fails, seconds=60, what="liveness fails")
        assert "dead watch" in operator.get("/healthz")[1]
        # And it is no one-way street.
        proxy.rules.clear()
        eventually(lambda: operator.get("/healthz")[0] == 200, seconds=60, what="the watches are back")
        bounded(proxy, 45)


def test_two_operators_do_no_harm(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str
) -> None:
    jobs = Jobs(cluster.admin, namespace)
    with serving(cluster, proxy, namespace), serving(cluster, proxy, namespace):
        live(
            jobs, kubelet, "twice", lambda done: eventually(done, seconds=90, what="a step with two operators") and None
        )
        check(jobs, proxy, "twice")
        bounded(proxy, 90)


def test_a_pytorchjob_that_another_operator_created_may_have_ended(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str
) -> None:
    """The pods that the pass has read are older than the PyTorchJob that it finds."""
    jobs = Jobs(cluster.admin, namespace)

    def succeeded() -> bool:
        conditions = jobs.children()["found-2"].get("status", {}).get("conditions", ())
        return any(c["type"] == "Succeeded" and c["status"] == "True" for c in conditions)

    def rule(call: Call) -> None:
        body = json.loads(call.body) if call.kind == "POST pytorchjobs" and call.mutating else {"metadata": {}}
        if body["metadata"].get("name") == "found-2" and "found-2" not in jobs.children():
            cluster.admin.create(PYTORCHJOBS, namespace, body)
            kubelet.finish(namespace, "found-2-master-0", DONE)
            eventually(succeeded, what="the PyTorchJob has succeeded")

    proxy.rules.append(rule)
    with serving(cluster, proxy, namespace):
        jobs.create(manifest("found", run_policy={"maxRestarts": 1}))
        kubelet.finish(namespace, "found-1-master-0", last_words("Communication", message="lost a peer"), 75)
        eventually(lambda: "completionTime" in jobs.status("found"), seconds=60, what="the job is over")
        assert jobs.status("found")["state"] == "Succeeded"


def test_an_api_server_that_restarts_is_waited_for(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str
) -> None:
    jobs = Jobs(cluster.admin, namespace)
    with serving(cluster, proxy, namespace) as operator:
        jobs.create(manifest("outage"))
        jobs.wait_child("outage-1")
        kubelet.pod(namespace, "outage-1-master-0")
        cluster.restart_apiserver()
        assert operator.get("/healthz")[0] == 200
        kubelet.finish(namespace, "outage-1-master-0", DONE)
        jobs.wait_state("Succeeded", name="outage", seconds=90)


def test_deletion_needs_no_operator(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str
) -> None:
    """What an operator made and let run goes with its DPOJob, or its namespace, when that operator is gone."""
    jobs = Jobs(cluster.admin, namespace)
    with serving(cluster, proxy, namespace):
        for name in ("orphan", "left"):
            jobs.create(manifest(name, nodes=2))
        for name in ("orphan", "left"):
            jobs.wait_state("Running", name=name)
    for name in ("orphan", "left"):
        *child_and_pods, config_map = sorted(owned(jobs, name))
        assert child_and_pods == [f"{name}-1", f"{name}-1-master-0", f"{name}-1-worker-0"]
        assert config_map.startswith(f"{name}-spec-")
    jobs.delete("orphan")
    eventually(lambda: not owned(jobs, "orphan"), seconds=60, what="child, pods and ConfigMap are collected")
    assert len(owned(jobs, "left")) == 4
    cluster.admin.delete(("v1", "namespaces"), None, namespace)
    eventually(lambda: cluster.admin.find(("v1", "namespaces"), None, namespace) is None, seconds=60,
               what="the namespace is gone")  # fmt: skip


def test_a_recreated_job_waits_for_the_pods_of_the_deleted_one(
    cluster: ControlPlane, kubelet: FakeKubelet, proxy: ChaosProxy, namespace: str
) -> None:
    jobs = Jobs(cluster.admin, namespace)
    with serving(cluster, proxy, namespace):
        first = jobs.create(manifest("again"))
        pod = kubelet.pod(namespace, "again-1-master-0")
        jobs.wait_state("Running", name="again")
        kubelet.keep_terminating(namespace)
        jobs.delete("again")
        eventually(lambda: jobs.pods()["again-1-master-0"]["metadata"].get("deletionTimestamp"), what="it terminates")
        second = jobs.create(manifest("again"))
        assert second["metadata"]["uid"] != first["metadata"]["uid"]
        eventually(
            lambda: jobs.conditions("again").get("Progressing") or {},
            until=lambda c: c.get("reason") == "WaitingForNamesake",
            what="WaitingForNamesake",
        )
        assert "again-1" not in jobs.children()
        kubelet.finish_terminating(namespace)
        jobs.wait_child("again-1")
        assert kubelet.pod(namespace, "again-1-master-0")["metadata"]["uid"] != pod["metadata"]["uid"]
        kubelet.finish(namespace, "again-1-master-0", DONE)
        jobs.wait_state("Succeeded", name="again")
        assert cluster.admin.get(DPOJOBS, namespace, "again")["status"]["restarts"] == 0
        bounded(proxy, 40)
