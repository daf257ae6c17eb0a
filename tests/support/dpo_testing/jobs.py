"""DPOJobs for tests, and what tests ask about them."""

from __future__ import annotations

from typing import Any

from dpo_testing.kubeapi import DPOJOBS, EVENTS, PYTORCHJOBS, Api, Object, eventually


def manifest(name: str = "job", *, nodes: int = 1, run_policy: Object | None = None, **spec: Any) -> Object:
    """Return a small, valid DPOJob on CPUs. ``spec`` replaces whole sections."""
    return {
        "apiVersion": DPOJOBS[0],
        "kind": "DPOJob",
        "metadata": {"name": name},
        "spec": {
            "image": "localhost/trainer:1",
            "model": {"huggingFace": {"uri": "s3://models/tiny/"}},
            "data": {"train": [{"uri": "s3://prefs/train.jsonl"}]},
            "resources": {"nodes": nodes, "gpusPerNode": 0},
            "checkpoint": {"uri": f"s3://runs/{name}/", "gracePeriodSeconds": 30},
            "storage": {"credentialsSecretRef": {"name": "s3-credentials"}},
            "runPolicy": run_policy or {},
            **spec,
        },
    }


class Jobs:
    """The DPOJobs of one namespace, as seen through the API server."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api = api
        self.namespace = namespace

    def create(self, body: Object) -> Object:
        """Create a job; one of this name that a failed try of the same test left is deleted first."""
        name = str(body["metadata"]["name"])
        if self.api.find(DPOJOBS, self.namespace, name) is not None:
            self.delete(name)
            eventually(lambda: not any(child.startswith(f"{name}-") for child in (*self.children(), *self.pods())))
        return self.api.create(DPOJOBS, self.namespace, body)

    def get(self, name: str = "job") -> Object:
        return self.api.get(DPOJOBS, self.namespace, name)

    def status(self, name: str = "job") -> Object:
        found: Object = self.get(name).get("status") or {}
        return found

    def patch(self, name: str, spec: Object) -> Object:
        return self.api.patch(DPOJOBS, self.namespace, name, {"spec": spec})

    def delete(self, name: str = "job") -> None:
        self.api.delete(DPOJOBS, self.namespace, name)

    def conditions(self, name: str = "job") -> dict[str, Object]:
        return {c["type"]: c for c in self.status(name).get("conditions") or []}

    def children(self) -> dict[str, Object]:
        return {c["metadata"]["name"]: c for c in self.api.list(PYTORCHJOBS, self.namespace)}

    def pods(self) -> dict[str, Object]:
        return {p["metadata"]["name"]: p for p in self.api.list(("v1", "pods"), self.namespace)}

    def events_about(self, name: str = "job") -> list[Object]:
        """Return all events about a DPOJob."""
        selector = f"involvedObject.name={name},involvedObject.kind=DPOJob"
        return self.api.list(EVENTS, self.namespace, fieldSelector=selector)

    def events(self, name: str = "job") -> dict[str, Object]:
        """Return the events about a DPOJob by reason."""
        return {event["reason"]: event for event in self.events_about(name)}

    def wait_state(self, *states: str, name: str = "job", seconds: float = 40.0) -> Object:
        """Wait until the job is in one of these states; return its status."""
        return eventually(
            lambda: self.status(name),
            until=lambda status: status.get("state") in states,
            seconds=seconds,
            what=f"{name} is {' or '.join(states)}",
        )

    def wait_child(self, child: str, *, seconds: float = 40.0) -> Object:
        """Wait for a PyTorchJob of this name."""
        found = eventually(
            lambda: self.api.find(PYTORCHJOBS, self.namespace, child), seconds=seconds, what=f"PyTorchJob {child}"
        )
        assert found is not None
        return found
