"""The operator's wall clock jumps under it, and a pod of an attempt that was given up comes back to life."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dpo_operator import clock as moments
from dpo_testing.chaosproxy import ChaosProxy
from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.faketrainer import FakeTrainer
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import DPOJOBS, eventually
from dpo_testing.operatorprocess import OperatorProcess
from dpo_testing.playedclock import PlayedClock

pytestmark = pytest.mark.slow

DONE = last_words("Succeeded", step=9, total=9, runDir="s3://runs/job/", modelUri="s3://runs/job/model/")
HOUR = 3600.0
DAYS = 24 * HOUR
LOOKS = 3
"""Passes that must bring nothing new before a job counts as being at rest."""


def at_rest(operator: OperatorProcess, proxy: ChaosProxy) -> None:
    """Wait until the operator looks again and again, and has nothing to write any more."""

    def quiet() -> bool:
        passes, calls = operator.passes(), len(proxy.calls)
        eventually(lambda: operator.passes() >= passes + LOOKS, what="it looks on")
        return len(proxy.calls) == calls

    eventually(quiet, what="it stops writing")


@pytest.mark.parametrize(
    "jump",
    [HOUR, *(pytest.param(jump, marks=pytest.mark.nightly) for jump in (-24 * HOUR, -HOUR, 24 * HOUR))],
    ids=lambda jump: f"{jump / HOUR:+.0f}h",
)
def test_a_jump_of_the_clock_repeats_nothing_and_loses_nothing(
    cluster: ControlPlane, kubelet: FakeKubelet, namespace: str, tmp_path: Path, jump: float
) -> None:
    jobs, clock = Jobs(cluster.admin, namespace), PlayedClock(tmp_path / "clock")
    # The pause of a minute is longer than this test waits for anything: it is the jump that must not matter.
    flags = ("--scrape-by=pod-ip", "--resync-seconds=0.3", "--backoff-base-seconds=60", "--backoff-max-seconds=60")
    policy = {
        "maxRestarts": 1,
        "activeDeadlineSeconds": int(3 * DAYS),
        "ttlSecondsAfterFinished": int(3 * DAYS),
    }
    with ChaosProxy(cluster.url, cluster.tls()) as proxy:
        kubeconfig = cluster.identity("admin", ["system:masters"], server=proxy.url)
        with OperatorProcess(kubeconfig, *flags, namespaces=namespace, clock=clock) as operator:
            jobs.create(manifest("tossed", run_policy=policy))
            first = kubelet.pod(namespace, "tossed-1-master-0")
            with FakeTrainer.of(first) as trainer:
                for step, shift in enumerate((0.0, jump, 0.0, jump), start=1):
                    clock.set(shift)
                    trainer.say(step=step, total=9, metrics={"train/loss": 0.6})
                    seen = eventually(
                        lambda: jobs.status("tossed"),
                        until=lambda status, n=step: (status.get("progress") or {}).get("step") == n,  # type: ignore[misc]
                        what=f"step {step} is written at a clock that is {shift:.0f} s ahead",
                    )
                    # It does see the clock that is played, or this test says nothing.
                    assert abs(moments.to_moment(seen["progress"]["observedAt"]) - clock.now()) < HOUR / 2
                    assert seen["state"] == "Running"
            at_rest(operator, proxy)

            # In the pause before the next attempt, which it ends if it does anything to it.
            clock.set(0.0)
            kubelet.exit(first, 75, last_words("Communication", message="lost a peer"))
            eventually(lambda: jobs.status("tossed").get("nextAttemptTime"), what="the pause")
            assert jobs.children().keys() == {"tossed-1"}
            clock.set(jump)
            jobs.wait_child("tossed-2")
            second = kubelet.pod(namespace, "tossed-2-master-0")
            jobs.wait_state("Running", name="tossed")
            for shift in (0.0, jump):
                clock.set(shift)
                at_rest(operator, proxy)
                status = jobs.status("tossed")
                assert (status["state"], status["chargedRestarts"]) == ("Running", 1)

            kubelet.exit(second, 0, DONE)
            status = jobs.wait_state("Succeeded", name="tossed")
            assert [(a["number"], a["result"]) for a in status["attempts"]] == [(1, "Failed"), (2, "Succeeded")]
            for shift in (0.0, jump):
                clock.set(shift)
                at_rest(operator, proxy)
                assert jobs.status("tossed")["state"] == "Succeeded", "its time to live is not over"
            clock.set(jump + 4 * DAYS)
            eventually(lambda: jobs.api.find(DPOJOBS, namespace, "tossed") is None, what="its time to live is over")
            assert operator.exceptions() == []
    made = Counter(json.loads(call.body)["metadata"]["name"] for call in proxy.calls if call.kind == "POST pytorchjobs")
    assert made == {"tossed-1": 1, "tossed-2": 1}
    assert Counter(call.kind for call in proxy.calls if call.method == "DELETE") == {"DELETE dpojobs": 1}
    told = Counter(event["reason"] for event in jobs.api.list(("v1", "events"), namespace) if _about(event, "tossed"))
    # Once a transition; what is said of each attempt twice.
    twice = {word for word, count in told.items() if count > 1}
    assert {"PyTorchJobCreated", "TrainingStarted"} <= twice <= {"PyTorchJobCreated", "TrainingStarted", "ScrapeFailed"}
    assert {"Communication", "Restarting", "Succeeded", "Expired"} <= told.keys()
    assert max(told.values()) == 2


@pytest.mark.nightly  # tests/operator/unit/test_clock_jumps.py has the decisions
def test_a_jump_of_the_clock_while_pods_start_costs_one_attempt_and_no_more(
    cluster: ControlPlane, kubelet: FakeKubelet, namespace: str, tmp_path: Path
) -> None:
    """``startTimeoutSeconds`` is wall time, as docs/restarts.md says: set forward, it ends an attempt that waits."""
    jobs, clock = Jobs(cluster.admin, namespace), PlayedClock(tmp_path / "clock")
    kubelet.hold(namespace)
    with ChaosProxy(cluster.url, cluster.tls()) as proxy:
        kubeconfig = cluster.identity("admin", ["system:masters"], server=proxy.url)
        flags = ("--scrape-by=off", "--resync-seconds=0.3")
        with OperatorProcess(kubeconfig, *flags, namespaces=namespace, clock=clock) as operator:
            jobs.create(manifest("waits", run_policy={"maxRestarts": 1}))
            for shift in (0.0, -24 * HOUR):
                clock.set(shift)
                jobs.wait_state("Starting", name="waits")
                at_rest(operator, proxy)
                assert [a.get("result") for a in jobs.status("waits")["attempts"]] == [None]
            clock.set(24 * HOUR)
            jobs.wait_child("waits-2")
            jobs.wait_state("Starting", name="waits")
            at_rest(operator, proxy)
            # What the new attempt counts from is the new time; that the clock is set right again does it no harm.
            clock.set(0.0)
            at_rest(operator, proxy)
            assert jobs.status("waits")["chargedRestarts"] == 1
            assert jobs.children().keys() == {"waits-2"}
            kubelet.release(namespace)
            kubelet.finish(namespace, "waits-2-master-0", DONE)
            status = jobs.wait_state("Succeeded", name="waits")
            assert [(a["number"], a["result"], a["reason"]) for a in status["attempts"]] == [
                (1, "Failed", "StartTimeout"), (2, "Succeeded", "Succeeded"),
            ]  # fmt: skip
            assert operator.exceptions() == []
    made = Counter(json.loads(call.body)["metadata"]["name"] for call in proxy.calls if call.kind == "POST pytorchjobs")
    assert made == {"waits-1": 1, "waits-2": 1}
    assert Counter(call.kind for call in proxy.calls if call.method == "DELETE") == {"DELETE pytorchjobs": 1}


def _about(event: dict[str, dict[str, str]], name: str) -> bool:
    about = event["involvedObject"]
    return (about["kind"], about["name"]) == ("DPOJob", name)


@pytest.mark.parametrize(("words", "code"), [pytest.param("Succeeded", 0, marks=pytest.mark.nightly), ("Fenced", 9)])
def test_a_zombie_of_attempt_1_changes_nothing_of_attempt_2(
    cluster: ControlPlane, kubelet: FakeKubelet, namespace: str, tmp_path: Path, words: str, code: int
) -> None:
    """Its node is lost and comes back when attempt 2 runs. The trainer's own fence is tests/distributed's matter."""
    jobs, clock = Jobs(cluster.admin, namespace), PlayedClock(tmp_path / "clock")
    flags = ("--scrape-by=pod-ip", "--node-failure-toleration-seconds=1", "--resync-seconds=0.3")
    with OperatorProcess(cluster.kubeconfig, *flags, namespaces=namespace, clock=clock) as operator:
        jobs.create(manifest("undead", run_policy={"maxRestarts": 0}))
        old = kubelet.pod(namespace, "undead-1-master-0")
        jobs.wait_state("Running", name="undead")
        node = old["spec"]["nodeName"]
        kubelet.lose_node(node)
        status = eventually(
            lambda: {**jobs.status("undead"), "nodes": kubelet.readiness()},
            until=lambda status: status["attempts"][0].get("result") == "Failed",
            seconds=60,
            what=f"attempt 1 has lost its node, {node}",
        )
        assert status["attempts"][0]["reason"] == "NodeLost"
        # As long as the pod may live its successor waits; it is given up after its grace period and half a minute.
        passes = operator.passes()
        eventually(lambda: operator.passes() >= passes + 4 * LOOKS, what="the operator looks on")
        status = jobs.status("undead")
        assert (status["attempts"][0].get("endTime"), status.get("nextAttemptTime")) == (None, None)
        assert status["message"].endswith("Waiting for its last pods to terminate.")
        assert jobs.children().keys() == {"undead-1"}
        clock.set(HOUR)
        jobs.wait_child("undead-2")
        new = kubelet.pod(namespace, "undead-2-master-0")
        assert new["spec"]["nodeName"] != node
        ghost = jobs.pods()["undead-1-master-0"]
        assert (ghost["metadata"]["uid"], ghost["status"]["phase"]) == (old["metadata"]["uid"], "Running")

        with FakeTrainer.of(old) as zombie, FakeTrainer.of(new) as trainer:
            zombie.say(phase="done", step=99, total=99, lastCheckpointStep=99)
            trainer.say(step=2, total=9)

            def progress() -> int:
                return int((jobs.status("undead").get("progress") or {}).get("step") or 0)

            eventually(lambda: progress() == 2, what="attempt 2 is asked")
            jobs.wait_state("Running", name="undead")
            before = jobs.status("undead")["attempts"]
            # Its node is back: the pod's end, and words of a success or of a permanent error, reach the API server.
            kubelet.exit(ghost, code, last_words(words, step=99, total=99, attempt=1, modelUri="s3://runs/zombie/"))
            passes = operator.passes()
            eventually(lambda: operator.passes() >= passes + LOOKS, what="the operator looks on")
            untouched(jobs, before)
            # It even answers in its successor's place.
            trainer.say(phase="done", step=99, total=99, attempt=zombie.attempt, lastCheckpointStep=99)
            eventually(
                lambda: "False" in jobs.conditions("undead")["ProgressAvailable"]["status"], what="it is noticed"
            )
            untouched(jobs, before)
            assert progress() == 2
            trainer.say(step=3, total=9)
            eventually(lambda: progress() == 3, what="attempt 2 is heard again")
            assert zombie.asked == 0
        kubelet.add_node(node)
        eventually(lambda: "undead-1-master-0" not in jobs.pods(), what="the node removes the pod")
        kubelet.exit(new, 0, DONE)
        status = jobs.wait_state("Succeeded", name="undead")
        assert (status["modelURI"], status["progress"]["step"]) == ("s3://runs/job/model/", 9)
        assert [(a["number"], a["result"], a["reason"]) for a in status["attempts"]] == [
            (1, "Failed", "NodeLost"), (2, "Succeeded", "Succeeded"),
        ]  # fmt: skip
        assert set(jobs.children()) == {"undead-1", "undead-2"}
        assert operator.exceptions() == []


def untouched(jobs: Jobs, attempts: object) -> None:
    status = jobs.status("undead")
    assert status["state"] == "Running"
    assert status.get("modelURI") is None
    known = [{k: v for k, v in a.items() if k not in ("lastStep", "fromStep")} for a in status["attempts"]]
    assert known == [{k: v for k, v in a.items() if k not in ("lastStep", "fromStep")} for a in attempts]  # type: ignore[attr-defined]
    assert [a.get("lastStep") for a in status["attempts"]] == [None, 2]
