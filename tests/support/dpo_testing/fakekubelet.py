"""Plays scheduler and kubelets for tests: nodes with leases, pods that run and end as a test says.

Only what a real kubelet would write is written: pod status, node status, leases, and the last step of a deletion. A
lost node is one that stops; what follows (the taint, the eviction, DisruptionTarget) is the real controllers' work.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3.exceptions

from dpo_testing.kubeapi import PODS, Api, ApiError, Object, eventually, path_of

NODES = ("v1", "nodes")
LEASES = ("coordination.k8s.io/v1", "leases")
LEASE_NAMESPACE = "kube-node-lease"
PORT = 9400
STOP = 0.3
"""Seconds that the containers of a deleted pod take to stop. At once would be before controllers see it."""
_NETWORK = 130 + os.getpid() % 120
"""Second octet of this process's pods: trainers listen on a fixed port, and two test runs may share a machine."""


def now() -> str:
    """Return the present moment as Kubernetes writes it."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def last_words(outcome: str = "Succeeded", **more: Any) -> str:
    """Return the JSON that the trainer leaves as its termination message."""
    return json.dumps({"outcome": outcome, **more})


class FakeKubelet:
    """Nodes ``node-0``… of a cluster. Pods are bound and run at once, but in the namespaces that are held."""

    def __init__(self, api: Api, nodes: int = 3) -> None:
        """Prepare; ``start`` registers the nodes."""
        self._api = api
        self._live = [f"node-{index}" for index in range(nodes)]
        self._held: set[str] = set()
        self._deaf: set[str] = set()
        self._news: queue.SimpleQueue[Object | None] = queue.SimpleQueue()
        """All pods by key; a watch's event; or None: what may happen to pods has changed."""
        self._stopping: dict[str, float] = {}
        """Moment at which a deleted pod has stopped, by uid."""
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._turn = itertools.count()
        self._addresses = itertools.count(1)
        self.on_running: Callable[[Object], None] | None = None
        """Called with each pod that has just started."""

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Register the nodes and begin."""
        for name in self._live:
            self._register(name)
        for target in (self._renew_leases, self._watch_pods, self._run_pods):
            thread = threading.Thread(target=target, name=f"kubelet-{target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End the threads; objects stay."""
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    def hold(self, namespace: str) -> None:
        """Leave new pods of a namespace pending, as a full cluster does."""
        self._held.add(namespace)

    def release(self, namespace: str) -> None:
        """Let the pods of a namespace run again."""
        self._held.discard(namespace)
        self._news.put(None)

    def keep_terminating(self, namespace: str) -> None:
        """Let deleted pods of a namespace terminate until ``finish_terminating``."""
        self._deaf.add(namespace)

    def finish_terminating(self, namespace: str) -> None:
        """Let deleted pods of a namespace go."""
        self._deaf.discard(namespace)
        self._news.put(None)

    def add_node(self, name: str) -> None:
        """Register one more node."""
        self._register(name)
        self._live.append(name)
        self._news.put(None)

    def lose_node(self, name: str) -> None:
        """Stop a node: its lease is renewed no more and its pods are out of reach."""
        self._live.remove(name)

    def readiness(self) -> dict[str, list[str]]:
        """What the node controller makes of each node: the status of its condition Ready, and its taints."""
        found: dict[str, list[str]] = {}
        for node in self._api.list(NODES):
            ready = [c["status"] for c in node.get("status", {}).get("conditions", ()) if c["type"] == "Ready"]
            taints = [f"{taint['key']}:{taint['effect']}" for taint in node["spec"].get("taints", ())]
            found[node["metadata"]["name"]] = ready + taints
        return found

    def _register(self, name: str) -> None:
        capacity = {"cpu": "64", "memory": "256Gi", "pods": "1000", "nvidia.com/gpu": "64"}
        status = {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": [
                {
                    "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "ready",
                    "lastHeartbeatTime": now(), "lastTransitionTime": now(),
                }
            ],
        }  # fmt: skip
        if self._api.find(NODES, None, name) is None:
            self._api.create(NODES, None, {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}})
        self._api.patch(NODES, None, name, {"status": status}, sub="status")
        self._renew(name)

    def _renew(self, name: str) -> None:
        # Microseconds are part of a lease's form.
        renewed = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": name, "leaseDurationSeconds": 20, "renewTime": renewed}
        try:
            self._api.patch(LEASES, LEASE_NAMESPACE, name, {"spec": spec})
        except ApiError as error:
            if error.status != 404:
                raise
            self._api.create(LEASES, LEASE_NAMESPACE, {"metadata": {"name": name}, "spec": spec})

    def _renew_leases(self) -> None:
        def renew(name: str) -> None:
            with contextlib.suppress(ApiError, OSError, urllib3.exceptions.HTTPError):
                self._renew(name)

        with ThreadPoolExecutor(4) as pool:  # each node has a kubelet of its own: one must not wait for another
            while not self._stop.wait(3.0):
                list(pool.map(renew, tuple(self._live)))

    # -- pods ---------------------------------------------------------------------------------------------------------

    def _watch_pods(self) -> None:
        while not self._stop.is_set():
            # The API server may be away: a kubelet tries again.
            with contextlib.suppress(ApiError, OSError, urllib3.exceptions.HTTPError):
                listed = self._api.call("GET", path_of(PODS))
                self._news.put({_key(pod): pod for pod in listed["items"]})
                version = listed["metadata"]["resourceVersion"]
                while not self._stop.is_set():
                    for event in self._api.watch(PODS, version):
                        version = event["object"]["metadata"]["resourceVersion"]
                        self._news.put(event)
            self._stop.wait(0.15)

    def _run_pods(self) -> None:
        """Take one step with each pod that has changed; one that is not done is tried again."""
        pods: dict[str, Object] = {}
        due: set[str] = set()
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                news = self._news.get(timeout=0.15 if due else 1.0)
                if news is None:  # a test has changed what may happen
                    due.update(pods)
                elif "type" not in news:
                    pods, due = news, set(news)
                elif news["type"] == "DELETED":
                    pods.pop(_key(news["object"]), None)
                else:
                    pods[_key(news["object"])] = news["object"]
                    due.add(_key(news["object"]))
            if not self._news.empty():
                continue  # the newest state first
            for key in tuple(due):
                if key not in pods or self._step(pods[key]):
                    due.discard(key)

    def _step(self, pod: Object) -> bool:
        """Do what is next for a pod; return False if that failed or is not due yet, and should be tried again."""
        namespace, node = pod["metadata"]["namespace"], pod["spec"].get("nodeName")
        phase = pod.get("status", {}).get("phase", "Pending")
        try:
            if pod["metadata"].get("deletionTimestamp"):
                if namespace not in self._deaf and (node is None or node in self._live):
                    if time.monotonic() < self._stopping.setdefault(pod["metadata"]["uid"], time.monotonic() + STOP):
                        return False
                    self._end_deleted(pod)
            elif namespace in self._held or phase != "Pending":
                pass
            elif node is None:
                self._bind(pod)
            elif node in self._live:
                self._run(pod)
        except (ApiError, OSError, urllib3.exceptions.HTTPError):
            return False
        return True

    def _bind(self, pod: Object) -> None:
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        node = self._live[next(self._turn) % len(self._live)]
        binding = {"metadata": {"name": name}, "target": {"kind": "Node", "name": node}}
        self._api.call("POST", path_of(PODS, namespace, name, "binding"), binding)

    def _run(self, pod: Object) -> None:
        index = next(self._addresses)
        address = f"127.{_NETWORK}.{index // 250 % 250}.{index % 250 + 1}"
        status = {
            "phase": "Running", "startTime": now(), "podIP": address, "podIPs": [{"ip": address}], "reason": None,
            "conditions": [_condition(kind) for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")],
            "containerStatuses": [
                _container(c, {"running": {"startedAt": now()}}, ready=True) for c in pod["spec"]["containers"]
            ],
            "initContainerStatuses": [
                _container(c, {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": now()}}, ready=True)
                for c in pod["spec"].get("initContainers", [])
            ],
        }  # fmt: skip
        done = self._set(pod, status)
        if self.on_running is not None:
            self.on_running(done)

    def _end_deleted(self, pod: Object) -> None:
        """Do what a kubelet does with a deleted pod: stop its containers, then let the object go."""
        if pod.get("status", {}).get("phase") == "Running":
            self.exit(pod, 143, last_words("Stopped", message="asked to stop"))
        uid = pod["metadata"]["uid"]
        self._api.delete(
            PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], gracePeriodSeconds=0,
            preconditions={"uid": uid},
        )  # fmt: skip

    def _set(self, pod: Object, status: Object) -> Object:
        return self._api.patch(
            PODS, pod["metadata"]["namespace"], pod["metadata"]["name"],
            {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}, sub="status",
        )  # fmt: skip

    # -- what tests make happen ---------------------------------------------------------------------------------------

    def pod(self, namespace: str, name: str) -> Object:
        """Wait until a pod runs and return it."""
        found = eventually(
            lambda: self._api.find(PODS, namespace, name),
            until=lambda pod: pod is not None and pod.get("status", {}).get("phase") == "Running",
            what=f"pod {name} runs",
        )
        assert found is not None
        return found

    def exit(self, pod: Object, code: int, message: str = "", *, reason: str | None = None) -> None:
        """End the trainer's container with an exit code, a termination message and Kubernetes' reason."""
        terminated = {
            "exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error"), "message": message,
            "startedAt": pod.get("status", {}).get("startTime") or now(), "finishedAt": now(),
        }  # fmt: skip
        self._set(
            pod,
            {
                "phase": "Succeeded" if code == 0 else "Failed",
                "containerStatuses": [
                    _container(c, {"terminated": terminated}, ready=False) for c in pod["spec"]["containers"]
                ],
            },
        )

    def finish(self, namespace: str, name: str, message: str = "", code: int = 0, *, reason: str | None = None) -> None:
        """Wait until a pod runs, then end it."""
        self.exit(self.pod(namespace, name), code, message, reason=reason)

    def evict(self, namespace: str, name: str) -> None:
        """Evict a running pod as a drain does, through the Eviction API."""
        self.pod(namespace, name)
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
        self._api.call("POST", path_of(PODS, namespace, name, "eviction"), body)

    def fail(self, pod: Object, reason: str | None = None, message: str = "", *, disruption: str | None = None) -> None:
        """End a pod without a word of its container, for Kubernetes' own reason, such as an eviction."""
        status: Object = {"phase": "Failed", "reason": reason, "message": message}
        if disruption is not None:
            status["conditions"] = [{**_condition("DisruptionTarget"), "reason": disruption, "message": message}]
        self._set(pod, status)

    def fail_init(self, pod: Object) -> None:
        """End a pod whose init container did not find what it looks for. The namespace should be held."""
        terminated = {"exitCode": 1, "reason": "Error", "startedAt": now(), "finishedAt": now()}
        ended = [_container(c, {"terminated": terminated}, ready=False) for c in pod["spec"]["initContainers"]]
        self._set(pod, {"phase": "Failed", "initContainerStatuses": ended})

    def waiting(self, namespace: str, name: str, reason: str, message: str, *, init: bool = False) -> None:
        """Show a pod as held up, such as by ImagePullBackOff. The namespace should be held."""
        pod = self._api.get(PODS, namespace, name)
        containers = pod["spec"].get("initContainers", []) if init else pod["spec"]["containers"]
        state = {"waiting": {"reason": reason, "message": message}}
        key = "initContainerStatuses" if init else "containerStatuses"
        self._set(pod, {"phase": "Pending", key: [_container(c, state, ready=False) for c in containers]})

    def creating(self, namespace: str, name: str) -> None:
        """Bind a pod and show it as its kubelet does until every volume is mounted. The namespace should be held."""
        self._bind(self._api.get(PODS, namespace, name))
        self.waiting(namespace, name, "ContainerCreating", "")

    def run_one(self, namespace: str, name: str) -> Object:
        """Bind one pod of a namespace that is held, and let it run."""
        self._bind(self._api.get(PODS, namespace, name))
        self._run(self._api.get(PODS, namespace, name))
        return self.pod(namespace, name)

    def unschedulable(self, namespace: str, name: str, message: str) -> None:
        """Show a pod as the scheduler does when no node fits. The namespace should be held."""
        pod = self._api.get(PODS, namespace, name)
        condition = {**_condition("PodScheduled", "False"), "reason": "Unschedulable", "message": message}
        self._set(pod, {"phase": "Pending", "conditions": [condition]})


def _key(pod: Object) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def _condition(kind: str, status: str = "True") -> Object:
    return {"type": kind, "status": status, "lastTransitionTime": now()}


def _container(container: Object, state: Object, *, ready: bool) -> Object:
    image = container["image"]
    return {
        "name": container["name"], "image": image, "imageID": image, "ready": ready, "restartCount": 0,
        "started": ready, "state": state,
    }  # fmt: skip
