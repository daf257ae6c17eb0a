"""Where tests make the operator say its words, each of them declared and then seen through the API."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import Object, eventually
from dpo_testing.witness import Witness

Test = Callable[..., None]

DECLARED: set[str] = set()
"""Words of all tests under ``sees``."""


class Stage:
    """Two namespaces that one operator serves: in ``jobs`` pods run at once, in ``held`` they wait for the test."""

    def __init__(self, cluster: ControlPlane, kubelet: FakeKubelet, witness: Witness, jobs: Jobs, held: Jobs) -> None:
        self.cluster, self.kubelet, self.witness, self.jobs, self.held = cluster, kubelet, witness, jobs, held

    def run(self, name: str, **more: Any) -> Object:
        """Create a job and return its running master."""
        self.jobs.create(manifest(name, **more))
        return self.kubelet.pod(self.jobs.namespace, f"{name}-1-master-0")

    def hold(self, name: str, role: str = "master", **more: Any) -> Object:
        """Create a job and return its master, or a worker, which waits."""
        self.held.create(manifest(name, **more))
        return eventually(lambda: self.held.pods().get(f"{name}-1-{role}-0") or {}, what=f"the {role} of {name}")

    def expect(self, *words: str) -> None:
        """Wait until every word has been seen."""
        eventually(
            lambda: sorted(set(words) - self.witness.seen()), until=lambda missing: not missing, what="all is seen"
        )


def sees(*words: str) -> Callable[[Test], Test]:
    """Declare what a test, which has the fixture ``stage``, provokes; it fails if the API does not show it."""
    DECLARED.update(words)

    def wrap(test: Test) -> Test:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            test(**fixtures)
            stage: Stage = fixtures["stage"]
            stage.expect(*words)

        return run

    return wrap


def columns(stage: Stage, name: str) -> dict[str, str]:
    """Return what `kubectl get -o wide` prints of a job, by column."""
    printed = stage.cluster.kubectl("get", "dpo", name, "-n", stage.jobs.namespace, "-o", "wide").stdout
    head, row = printed.splitlines()
    starts = [0, *(at + 1 for at in range(len(head) - 1) if head[at] == " " and head[at + 1] != " ")]
    ends = [*starts[1:], max(len(head), len(row)) + 1]
    return {head[a:b].strip(): row[a:b].strip() for a, b in zip(starts, ends, strict=True)}
