"""Random lives of a job: whatever happens to pods, caches and the operator itself, three things hold.

No attempt has two children; nothing is started again after a permanent error, unless the user retries; and once the
world is kind, the job ends.
"""

from __future__ import annotations

import contextlib
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpo_api.errors import Outcome
from dpo_testing.simcluster import Crash, SimCluster, manifest

FAILURES = [o for o in Outcome if o is not Outcome.Succeeded]
DISRUPTIONS = ["DeletionByTaintManager", "EvictionByEvictionAPI", "PreemptionByScheduler", "DeletionByPodGC"]


class Life(RuleBasedStateMachine):
    """One job, and everything that can happen to it."""

    def __init__(self) -> None:
        super().__init__()
        policy = {"maxRestarts": 3, "startTimeoutSeconds": 600, "activeDeadlineSeconds": 50_000}
        self.cluster = SimCluster(manifest(runPolicy=policy))
        self.cluster.delays = True
        self.doomed: str | None = None
        """The child in which a permanent error happened before anything else ended its attempt."""
        self.retries = 0

    # -- the operator

    @rule()
    def work(self) -> None:
        self.cluster.settle()

    @rule()
    def one_pass(self) -> None:
        self.cluster.reconcile()

    @rule(calls=st.integers(0, 4))
    def killed(self, calls: int) -> None:
        with contextlib.suppress(Crash):
            self.cluster.reconcile(budget=calls)

    @rule()
    def stale_caches(self) -> None:
        self.cluster.reconcile(blind=list(self.cluster.children))

    @rule(seconds=st.sampled_from([1, 15, 61, 700]))
    def time_passes(self, seconds: int) -> None:
        self.cluster.advance(seconds)

    # -- the cluster

    @rule()
    def training_operator(self) -> None:
        self.cluster.controller()

    @rule()
    def pods_run(self) -> None:
        self.cluster.run_pods()

    def running(self) -> list[str]:
        return sorted(n for n, pod in self.cluster.pods.items() if pod["status"]["phase"] == "Running")

    @precondition(lambda self: self.running())
    @rule(outcome=st.sampled_from(FAILURES), pick=st.integers(0, 3))
    def trainer_fails(self, outcome: Outcome, pick: int) -> None:
        names = self.running()
        name = names[pick % len(names)]
        self.cluster.end_pod(name, outcome, message="ended by the test", step=5, total=100)
        if outcome.retry == "permanent" and self.doomed is None:
            self.doomed = name.rpartition("-")[0].rpartition("-")[0]

    @precondition(lambda self: self.running())
    @rule(pick=st.integers(0, 3), code=st.sampled_from([1, 137, 139, 255]))
    def container_dies(self, pick: int, code: int) -> None:
        names = self.running()
        self.cluster.end_pod(names[pick % len(names)], code=code, message="a log's last line")

    @precondition(lambda self: self.running())
    @rule(pick=st.integers(0, 3), how=st.sampled_from(DISRUPTIONS))
    def pod_disrupted(self, pick: int, how: str) -> None:
        names = self.running()
        self.cluster.delete_pod(names[pick % len(names)], condition=how)

    @rule()
    def grace_ends(self) -> None:
        self.cluster.kill_leaving()

    @rule(step=st.integers(1, 90))
    def pods_stop_well(self, step: int) -> None:
        self.cluster.stop_leaving(step)

    @precondition(lambda self: self.cluster.children)
    @rule()
    def child_deleted_by_somebody(self) -> None:
        name = max(self.cluster.children)
        self.cluster.remove_child(name)
        if name not in [attempt["child"] for attempt in self.cluster.attempts]:
            # Created, then the operator was killed before it could note it, then deleted: nobody knows of it.
            self.cluster.created.remove(name)

    @precondition(lambda self: self.cluster.attempts)
    @rule(step=st.integers(0, 90), accuracy=st.floats(0, 1), saved=st.integers(0, 90))
    def progress(self, step: int, accuracy: float, saved: int) -> None:
        metrics = {"train/loss": 0.5, "train/acc": accuracy, "train/rewards_margin": accuracy - 0.5}
        self.cluster.say(step=step, metrics=metrics, last_checkpoint_step=saved)

    @rule(holds=st.booleans())
    def queue(self, holds: bool) -> None:
        self.cluster.queue_holds = holds
        for child in self.cluster.children.values():
            child["spec"]["runPolicy"]["suspend"] = holds
            child.pop("_podsMade", None)

    @rule(suspend=st.booleans())
    def user_suspends(self, suspend: bool) -> None:
        if self.cluster.job is not None:
            self.cluster.edit(suspend=suspend)

    @precondition(lambda self: self.cluster.state == "Failed")
    @rule()
    def user_retries(self) -> None:
        assert self.cluster.job is not None
        self.retries += 1
        self.cluster.job["metadata"].setdefault("annotations", {})["dpo-operator.dev/retry"] = str(self.retries)
        self.cluster.touch()
        self.doomed = None

    # -- what always holds

    @invariant()
    def one_child_an_attempt(self) -> None:
        created = self.cluster.created
        assert len(created) == len(set(created)), created
        numbers = [attempt["number"] for attempt in self.cluster.attempts]
        assert numbers == sorted(set(numbers)), numbers

    @invariant()
    def permanent_errors_end_it(self) -> None:
        if self.doomed is not None and self.cluster.created:
            later = self.cluster.created[self.cluster.created.index(self.doomed) + 1 :]
            assert not later, f"{later} after a permanent error in {self.doomed}"

    @invariant()
    def the_end_is_final(self) -> None:
        status = self.cluster.status
        if status.get("completionTime"):
            assert status["state"] in ("Succeeded", "Failed")
            assert status["attempts"][-1].get("endTime")

    def teardown(self) -> None:
        """The world turns kind: pods run and finish. The job must end soon."""
        cluster = self.cluster
        if cluster.job is None:
            return
        cluster.edit(suspend=False)
        cluster.queue_holds = False
        calls = len(cluster.calls)
        for _ in range(60):
            for child in cluster.children.values():
                child["spec"]["runPolicy"]["suspend"] = False
            cluster.kill_leaving()
            cluster.settle()
            if cluster.status.get("completionTime"):
                break
            cluster.run_pods()
            for name in self.running():
                if cluster.pods[name]["metadata"].get("deletionTimestamp") is None:
                    words: dict[str, Any] = {"step": 100, "total": 100, "model_uri": "s3://runs/job/model"}
                    cluster.end_pod(name, Outcome.Succeeded, **words)
            cluster.advance(60)
        assert cluster.status.get("completionTime"), cluster.status
        assert len(cluster.calls) - calls < 200
        before = len(cluster.calls)
        cluster.advance(10_000)
        cluster.settle()
        assert cluster.state in ("Succeeded", "Failed")
        assert len(cluster.calls) - before <= 8, "a finished job is left alone but for its history"


TestLife = pytest.mark.slow(Life.TestCase)
TestLife.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
