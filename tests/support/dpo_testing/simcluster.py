"""A cluster in memory, as far as one DPOJob sees it: an API server, training-operator, kubelets, and a clock.

It performs a decision's actions as the process does, and keeps count of everything that must not happen twice.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from dpo_api.errors import Outcome
from dpo_api.progress import LastWords, Progress
from dpo_operator import clock, labels, names, size
from dpo_operator.config import Settings
from dpo_operator.reconcile import reconcile
from dpo_operator.types import (
    CheckChild,
    ChildCheck,
    CreateChild,
    CreateConfigMap,
    CreateNetworkPolicy,
    Decision,
    DeleteChild,
    DeleteJob,
    EmitEvent,
    LookUpChild,
    LookUpConfigMap,
    Observed,
    PatchStatus,
    Refusal,
    Scrape,
)

Object = dict[str, Any]

START = 1_800_000_000.0
ROUNDS = 8


class Crash(Exception):  # noqa: N818 - no error of the code under test
    """The operator was killed between two calls."""


def manifest(**spec: Any) -> Object:
    """Return a small, valid DPOJob on two nodes. ``spec`` replaces whole sections."""
    return {
        "apiVersion": "dpo-operator.dev/v1alpha1",
        "kind": "DPOJob",
        "metadata": {"name": "job", "namespace": "team"},
        "spec": {
            "model": {"huggingFace": {"uri": "s3://models/tiny/"}},
            "data": {"train": [{"uri": "s3://prefs/train.jsonl"}]},
            "resources": {"nodes": 2, "gpusPerNode": 0, "memory": "1Gi"},
            "checkpoint": {"uri": "s3://runs/job/", "gracePeriodSeconds": 30},
            "storage": {"credentialsSecretRef": {"name": "s3-credentials"}},
            **spec,
        },
    }


def _copied[T](value: T) -> T:
    """Return a deep copy, in a quarter of copy.deepcopy's time."""
    return pickle.loads(pickle.dumps(value))  # type: ignore[no-any-return]  # noqa: S301 - our own objects


def merged(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


class SimCluster:
    """One namespace with one DPOJob."""

    def __init__(self, job: Object | None = None, settings: Settings | None = None) -> None:
        self.now = START
        self.settings = settings or Settings(trainer_image="trainer:test")
        self.job: Object | None = _copied(job or manifest())
        self.job["metadata"] |= {
            "uid": "uid-1",
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": clock.to_text(START),
        }
        self.children: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.config_maps: dict[str, Object] = {}
        self.network_policies: dict[str, Object] = {}
        self.events: dict[str, Object] = {}
        self.cluster_events: list[Object] = []
        self.scrape: Scrape | None = None
        self.refuse: dict[str, Refusal] = {}
        """By object name: what the API server refuses."""
        self.invalid: Refusal | None = None
        """What a dry run of the child answers."""
        self.object_limit: int | None = None
        """Bytes of the DPOJob above which a status write is refused."""
        self.queue_holds = False
        self.backend_installed = True
        self.created: list[str] = []
        """Every child that was ever created, in order."""
        self.deleted: list[str] = []
        self.calls: list[str] = []
        """Kinds of all mutating calls."""
        self.decision = Decision()
        self.delays = False
        """Whether the operator remembers its last status write, so that it may delay the next one."""
        self._written: float | None = None
        self._policy: Object | None = None
        """What the operator's process remembers; see ``Observed.written`` and ``Observed.network_policy``."""
        self._uids = 0
        self._version = 1

    # -- the operator

    def observed(self) -> Observed:
        """Return what a process with fresh caches sees."""
        assert self.job is not None
        return Observed(
            job=_copied(self.job),
            children=_copied(list(self.children.values())),
            pods=_copied(list(self.pods.values())),
            events=_copied(self.cluster_events),
            scrape=self.scrape,
            backend_installed=self.backend_installed,
            written=self._written if self.delays else None,
            network_policy=self._policy,
        )

    def reconcile(self, *, budget: int | None = None, blind: Iterable[str] = ()) -> Decision:
        """Run one pass. ``budget``: mutating calls until the operator is killed; ``blind``: children no cache shows."""
        hidden = set(blind)
        if self.job is None:
            return Decision()
        observed = self.observed()
        shown = [child for child in observed.children if child["metadata"]["name"] not in hidden]
        observed = replace(observed, children=shown)
        for _ in range(ROUNDS):
            decision = reconcile(observed, self.now, self.settings)
            assert decision == reconcile(observed, self.now, self.settings), "reconcile is not pure"
            self._check_order(decision)
            news = observed
            for action in (*decision.actions, *decision.later):
                mutating = not isinstance(action, CheckChild | LookUpChild | LookUpConfigMap)
                if mutating and budget is not None:
                    if budget == 0:
                        self._written = self._policy = None
                        raise Crash
                    budget -= 1
                news = self._perform(action, observed)
                if news is not observed:
                    break
            if news is observed:
                self.decision = decision
                self._remember(decision)
                return decision
            observed = news
        raise AssertionError(f"no end after {ROUNDS} rounds")

    def _remember(self, decision: Decision) -> None:
        for action in decision.actions:
            if isinstance(action, PatchStatus):
                self._written, self._policy = self.now, None
            elif decision.delayed and isinstance(action, CreateNetworkPolicy):
                self._policy = _copied(action.body)

    def _check_order(self, decision: Decision) -> None:
        kinds = [type(action).__name__ for action in decision.actions]
        assert kinds.count("PatchStatus") <= 1, kinds
        assert "PatchStatus" not in kinds[:-1], kinds
        assert kinds.count("CreateChild") <= 1, kinds

    def _perform(self, action: object, observed: Observed) -> Observed:
        assert self.job is not None
        if not isinstance(action, CheckChild | LookUpChild | LookUpConfigMap):
            self.calls.append(type(action).__name__)
        match action:
            case CheckChild(_, generation):
                return replace(observed, check=ChildCheck(generation, self.invalid))
            case CreateConfigMap(body):
                name = body["metadata"]["name"]
                if name in self.refuse:
                    return replace(observed, refusals={**observed.refusals, name: self.refuse[name]})
                if name in self.config_maps:
                    return replace(observed, config_map=self.config_maps[name])
                self.config_maps[name] = _copied(body)
            case CreateNetworkPolicy(body):
                name = body["metadata"]["name"]
                if name in self.refuse:
                    return replace(observed, refusals={**observed.refusals, name: self.refuse[name]})
                if name in self.network_policies:
                    return replace(observed, network_policy=self.network_policies[name])
                self.network_policies[name] = _copied(body)
            case CreateChild(body):
                return self._create_child(body, observed)
            case LookUpChild(name):
                found = self.children.get(name)
                if found is None:
                    return replace(observed, absent=observed.absent | {name})
                return replace(observed, children=[*observed.children, _copied(found)])
            case LookUpConfigMap(name):
                pinned = self.config_maps.get(name)
                if pinned is None:
                    return replace(observed, absent=observed.absent | {name})
                return replace(observed, config_map=_copied(pinned))
            case DeleteChild(name, uid):
                child = self.children.get(name)
                if child is not None and child["metadata"]["uid"] == uid:
                    self.deleted.append(name)
                    self.remove_child(name)
            case DeleteJob(_, uid):
                assert uid == self.job["metadata"]["uid"]
                self.job = None
            case EmitEvent(body):
                self.events.setdefault(body["metadata"]["name"], _copied(body))
            case PatchStatus(body):
                assert body["metadata"]["resourceVersion"] == self.job["metadata"]["resourceVersion"]
                status = json.loads(json.dumps(merged(self.job.get("status", {}), body["status"])))
                if self.object_limit is not None and len(json.dumps(status)) > self.object_limit:
                    limit = size.smaller(observed.status_limit)
                    assert limit is not None, "the API server refuses the smallest status"
                    return replace(observed, status_limit=limit)
                self.job["status"] = status
                self.touch()
        return observed

    def _create_child(self, body: Object, observed: Observed) -> Observed:
        name = body["metadata"]["name"]
        if name in self.refuse:
            return replace(observed, refusals={**observed.refusals, name: self.refuse[name]})
        if name in self.children:
            return replace(observed, children=[*observed.children, _copied(self.children[name])])
        alive = [n for n, pod in self.pods.items() if pod["status"]["phase"] == "Running" and not self._silent(pod)]
        assert not alive, f"{name} was created while {alive} may still write"
        child = _copied(body)
        self._uids += 1
        child["metadata"] |= {"uid": f"child-{self._uids}", "creationTimestamp": clock.to_text(self.now)}
        if self.queue_holds:
            child["spec"]["runPolicy"]["suspend"] = True
        self.children[name] = child
        self.created.append(name)
        return observed

    def _silent(self, pod: Object) -> bool:
        due = pod["metadata"].get("deletionTimestamp")
        return due is not None and self.now >= clock.to_moment(due) + self.settings.unreachable_margin_seconds

    def touch(self) -> None:
        """The DPOJob has changed."""
        assert self.job is not None
        self._version += 1
        self.job["metadata"]["resourceVersion"] = str(self._version)

    # -- time

    def advance(self, seconds: float) -> None:
        """Let time pass, and pods whose grace period is over end."""
        self.now += seconds

    def settle(self, *, passes: int = 40) -> None:
        """Let operator and training-operator work until nothing is due at this moment."""
        before = self._snapshot()
        for _ in range(passes):
            self.controller()
            self.reconcile()
            after = self._snapshot()
            if after == before and (self.job is None or self.decision.wake != 0):
                return
            before = after
        raise AssertionError("does not settle: " + json.dumps(self.status, indent=1))

    def _snapshot(self) -> str:
        return json.dumps([self.job, self.children, self.pods], sort_keys=True)

    def sleep(self) -> None:
        """Sleep until the operator asked to be woken, then settle."""
        assert self.decision.wake is not None
        self.advance(self.decision.wake)
        self.settle()

    def sleep_out(self) -> None:
        """Sleep until a pause between attempts is over."""
        while self.state == "Restarting":
            self.sleep()

    def lose_attempt(self, number: int) -> None:
        """End an attempt by a failure that is retried, and run on until the next one runs."""
        self.end_pod(f"job-{number}-worker-0", Outcome.Communication)
        self.settle()
        self.kill_leaving()
        self.settle()
        self.sleep_out()
        self.run_to("Running")

    # -- training-operator and kubelets

    def controller(self) -> None:
        """Do what training-operator does: create pods, judge the job, clean up."""
        for name, child in list(self.children.items()):
            if child["spec"]["runPolicy"].get("suspend"):
                for pod in self.pods_of(name):
                    self.delete_pod(pod["metadata"]["name"])
                continue
            status = child.setdefault("status", {"conditions": []})
            kinds = {c["type"] for c in status["conditions"] if c["status"] == "True"}
            if kinds & {"Failed", "Succeeded"}:
                for pod in self.pods_of(name):
                    if pod["status"]["phase"] in ("Running", "Pending"):
                        self.delete_pod(pod["metadata"]["name"])
                continue
            self._create_pods(name, child)
            phases = {p["metadata"]["name"]: p["status"]["phase"] for p in self.pods_of(name)}
            leaving = [
                p
                for p in self.pods_of(name)
                if p["metadata"].get("deletionTimestamp") and p["status"]["phase"] in ("Running", "Pending")
            ]
            if "Failed" in phases.values() or leaving:
                self._judge(child, "Failed", "a replica failed")
            elif phases.get(f"{name}-master-0") == "Succeeded":
                self._judge(child, "Succeeded", "the master succeeded")

    def _judge(self, child: Object, kind: str, message: str) -> None:
        stamp = clock.to_text(self.now)
        child["status"]["conditions"].append(
            {"type": kind, "status": "True", "lastTransitionTime": stamp, "message": message}
        )

    def _create_pods(self, name: str, child: Object) -> None:
        specs = child["spec"]["pytorchReplicaSpecs"]
        wanted = [("master", 0, specs["Master"])]
        wanted += [("worker", i, specs["Worker"]) for i in range(specs.get("Worker", {}).get("replicas", 0))]
        existing = {p["metadata"]["name"] for p in self.pods_of(name)}
        if child.get("_podsMade"):
            return
        for kind, index, spec in wanted:
            pod = f"{name}-{kind}-{index}"
            if pod in existing:
                continue
            own = {**spec["template"]["metadata"]["labels"], "training.kubeflow.org/replica-type": kind}
            self._uids += 1
            self.pods[pod] = {
                "metadata": {"name": pod, "uid": f"pod-{self._uids}", "labels": own},
                "spec": {"nodeName": f"node-{kind}-{index}"},
                "status": {"phase": "Pending"},
            }
        child["_podsMade"] = True

    def pods_of(self, child: str) -> list[Object]:
        """Return a child's pods."""
        return [pod for name, pod in self.pods.items() if name.startswith((f"{child}-master-", f"{child}-worker-"))]

    def remove_child(self, name: str) -> None:
        """Delete a child; the garbage collector deletes its pods."""
        self.children.pop(name, None)
        for pod in self.pods_of(name):
            self.delete_pod(pod["metadata"]["name"])

    def delete_pod(self, name: str, *, condition: str | None = None) -> None:
        """Ask a pod to end. Final and pending ones are gone at once; a running one has its grace period."""
        pod = self.pods[name]
        if pod["status"]["phase"] != "Running":
            del self.pods[name]
            return
        if condition is not None:
            disruption = {"type": "DisruptionTarget", "status": "True", "reason": condition, "message": "by the test"}
            pod["status"].setdefault("conditions", []).append(disruption)
        if pod["metadata"].get("deletionTimestamp") is None:
            grace = 30
            pod["metadata"]["deletionTimestamp"] = clock.to_text(self.now + grace)
            pod["metadata"]["deletionGracePeriodSeconds"] = grace

    def run_pods(self) -> None:
        """Let every pending pod run."""
        for index, pod in enumerate(self.pods.values()):
            if pod["status"]["phase"] == "Pending":
                pod["status"] |= {
                    "phase": "Running",
                    "podIP": f"10.0.0.{index + 1}",
                    "containerStatuses": [{"name": "pytorch", "state": {"running": {}}}],
                }

    def end_pod(
        self,
        name: str,
        outcome: Outcome | None = None,
        *,
        code: int | None = None,
        reason: str = "Error",
        message: str = "",
        **words: Any,
    ) -> None:
        """End a running pod's container: with a termination message, or with only an exit code."""
        pod = self.pods[name]
        said = message
        if outcome is not None:
            said = LastWords(outcome=outcome.name, message=message, **words).to_json()
            code = outcome.exit_code
        final = "Succeeded" if code == 0 else "Failed"
        terminated = {"exitCode": code, "reason": "Completed" if code == 0 else reason, "message": said}
        pod["status"] |= {
            "phase": final,
            "containerStatuses": [{"name": "pytorch", "state": {"terminated": terminated}}],
        }
        if pod["metadata"].get("deletionTimestamp") is not None:
            self.leaving = _copied(pod)

    def kill_leaving(self) -> None:
        """Kubelets end and remove every pod that was asked to go."""
        for name, pod in list(self.pods.items()):
            if pod["metadata"].get("deletionTimestamp") is not None:
                del self.pods[name]

    def stop_leaving(self, step: int) -> None:
        """Pods that were asked to go save a checkpoint and end as they should; their objects are still there."""
        for name, pod in list(self.pods.items()):
            if pod["metadata"].get("deletionTimestamp") is not None and pod["status"]["phase"] == "Running":
                text = f"asked to stop after step {step}"
                self.end_pod(name, Outcome.Stopped, message=text, step=step, total=100, last_checkpoint_step=step)

    def say(self, **progress: Any) -> None:
        """Let rank 0 answer GET /status."""
        child = self.created[-1]
        fence = names.fence(int(START), int(child.rpartition("-")[2]))
        said = Progress(**{"phase": "train", "total": 100, "attempt": fence, **progress})
        self.scrape = Scrape(at=self.now, child=child, progress=said)

    # -- the user

    def edit(self, **run_policy: Any) -> None:
        """Change spec.runPolicy."""
        assert self.job is not None
        self.job["spec"]["runPolicy"] = {**self.job["spec"].get("runPolicy", {}), **run_policy}
        self.job["metadata"]["generation"] += 1
        self.touch()

    def edit_spec(self, **sections: Any) -> None:
        """Change sections of the spec, as an author does who corrects a rejected job."""
        assert self.job is not None
        self.job["spec"] |= _copied(sections)
        self.job["metadata"]["generation"] += 1
        self.touch()

    # -- what tests ask

    @property
    def status(self) -> Object:
        """The stored status."""
        assert self.job is not None
        found: Object = self.job.get("status", {})
        return found

    @property
    def state(self) -> str:
        """The one word."""
        return str(self.status.get("state"))

    @property
    def attempts(self) -> list[Object]:
        """The stored attempts."""
        found: list[Object] = self.status.get("attempts", [])
        return found

    def condition(self, kind: str) -> tuple[str, str] | None:
        """Return status and reason of a condition."""
        for condition in self.status.get("conditions", []):
            if condition["type"] == kind:
                return condition["status"], condition["reason"]
        return None

    def event_reasons(self) -> list[str]:
        """Return the reasons of all events, in order."""
        return [event["reason"] for event in self.events.values()]

    def run_to(self, state: str, *, then: Callable[[], None] | None = None) -> None:
        """Settle with all pods running, and check the state."""
        self.settle()
        self.run_pods()
        self.settle()
        assert self.state == state, self.status
        if then is not None:
            then()


def attempt_labels(pod: Mapping[str, Any]) -> str:
    """Return the attempt that a pod's label names."""
    return str(pod["metadata"]["labels"][labels.ATTEMPT])


def avoided(child: Object) -> list[str]:
    """Return the nodes that a child's pods prefer others to."""
    pod = child["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    wishes = pod.get("affinity", {}).get("nodeAffinity", {}).get("preferredDuringSchedulingIgnoredDuringExecution", [])
    return [value for wish in wishes for field in wish["preference"]["matchFields"] for value in field["values"]]
