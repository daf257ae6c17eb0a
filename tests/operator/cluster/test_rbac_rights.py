"""The shipped Role is enough for a job's whole life, and no right in it is one too many."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import kopf
import pytest

from dpo_operator import rbac
from dpo_operator.runtime.cache import Cache
from dpo_operator.runtime.client import ApiError, Client, Unreachable
from dpo_operator.runtime.performer import Outdated, Performer
from dpo_operator.runtime.resources import CHILDREN, EVENTS, JOBS, PODS, Resource
from dpo_operator.runtime.scraper import Scraper
from dpo_operator.runtime.watchdog import Watchdog
from dpo_operator.types import (
    Action,
    CreateChild,
    CreateConfigMap,
    CreateNetworkPolicy,
    DeleteChild,
    DeleteJob,
    EmitEvent,
    LookUpChild,
    Observed,
    PatchStatus,
    ScrapeTarget,
)
from dpo_testing.accounts import ACCOUNT, RBAC, Account, account, may
from dpo_testing.chaosproxy import ChaosProxy, Fault
from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import DPOJOBS, NETWORK_POLICIES, PYTORCHJOBS, Object, eventually
from dpo_testing.operatorprocess import OperatorProcess

DONE = last_words("Succeeded", step=4, total=4, runDir="s3://runs/job/", modelUri="s3://runs/job/model/")


# --- enough ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["one namespace", "all namespaces"])
def limited(request: pytest.FixtureRequest, cluster: ControlPlane, namespace: str) -> Iterator[OperatorProcess]:
    """The operator as its service account, with only the shipped Role or ClusterRole."""
    everywhere = request.param == "all namespaces"
    role = rbac.cluster_role(outside=True) if everywhere else rbac.role(namespace, outside=True)
    who = account(cluster, namespace, role, everywhere=everywhere)
    eventually(lambda: may(cluster, who, "", "pods", "watch"), what="the authorizer knows the role")
    served = "" if everywhere else namespace
    with OperatorProcess(who.kubeconfig(cluster), "--scrape-by=api-proxy", namespaces=served) as process:
        yield process
        assert process.exceptions() == []
    if everywhere:
        for kind in ("clusterrolebindings", "clusterroles"):
            cluster.admin.delete((RBAC, kind), None, ACCOUNT)


def test_a_whole_life_passes_under_the_shipped_role(
    limited: OperatorProcess, cluster: ControlPlane, kubelet: FakeKubelet, namespace: str
) -> None:
    jobs = Jobs(cluster.admin, namespace)
    jobs.create(manifest("job", nodes=2, run_policy={"maxRestarts": 1, "attemptsHistoryLimit": 0}))
    kubelet.finish(namespace, "job-1-master-0", last_words("Communication", message="lost a peer"), 75)
    kubelet.pod(namespace, "job-2-master-0")
    jobs.wait_state("Running")
    jobs.patch("job", {"runPolicy": {"suspend": True}})
    jobs.wait_state("Suspended")
    jobs.patch("job", {"runPolicy": {"suspend": False}})
    kubelet.finish(namespace, "job-3-master-0", DONE)
    jobs.wait_state("Succeeded")
    assert {"Accepted", "PyTorchJobCreated", "Restarting", "Suspended", "Succeeded"} <= set(jobs.events())
    jobs.patch("job", {"runPolicy": {"ttlSecondsAfterFinished": 1}})
    eventually(lambda: cluster.admin.find(DPOJOBS, namespace, "job") is None, what="the DPOJob is deleted")
    # RBAC's refusals read: User "…" cannot list resource "…".
    assert " cannot " not in limited.log()
    assert 'cause="403"' not in limited.get("/metrics")[1]


def test_it_has_no_right_beyond_the_table(cluster: ControlPlane, namespace: str) -> None:
    who = account(cluster, namespace, rbac.role(namespace))
    eventually(lambda: may(cluster, who, "", "pods", "watch"), what="the authorizer knows the role")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }

    async def ask() -> Any:
        async with client_of(cluster, who) as client:
            return await client.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review)

    rules = asyncio.run(ask())["status"]["resourceRules"]
    had = {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    everyone = {"authorization.k8s.io", "authentication.k8s.io"}  # reviews of oneself
    assert {right for right in had if right[0] not in everyone} == RIGHTS - {("", "pods/proxy", "get")}
    for resource in ("secrets", "pods/exec", "pods/log", "serviceaccounts/token"):
        assert not may(cluster, who, "", resource, "get")
    assert not may(cluster, who, "", "pods", "list", namespace="default")


# --- not too much ----------------------------------------------------------------------------------------------------

RIGHTS = {(rule.group, rule.resource, verb) for rule in rbac.RULES for verb in rule.verbs}
Right = tuple[str, str, str]


@asynccontextmanager
async def client_of(cluster: ControlPlane, who: Account) -> AsyncIterator[Client]:
    """The operator's own client, as an account."""
    info = kopf.ConnectionInfo(server=cluster.url, ca_path=str(cluster.ca_file), token=who.token)
    client = Client(lambda: info, user_agent="tests")
    try:
        yield client
    finally:
        await client.close()


class Stage:
    """What a scenario plays on: the operator's client under some account, and objects that an admin has made."""

    def __init__(self, client: Client, jobs: Jobs) -> None:
        self.client = client
        self.jobs = jobs
        self.cache = Cache()
        self.performer = Performer(client, self.cache)

    async def perform(self, action: Action) -> Observed | None:
        """Carry out one action of a pass over the DPOJob `job`; raise Denied where the API server forbids it."""
        job = self.jobs.get()
        news = await self.performer.perform((self.jobs.namespace, "job"), Observed(job=job), [action])
        refusals = news.refusals.values() if news is not None else ()
        if any(refusal.code == 403 for refusal in refusals):
            raise ApiError(403, "Forbidden", str(refusals))
        return news


def _named(kind: str, name: str, **more: Any) -> Object:
    version = {"PyTorchJob": PYTORCHJOBS[0], "NetworkPolicy": NETWORK_POLICIES[0]}.get(kind, "v1")
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": {"dpo-operator.dev/job": "job"}},
        **more,
    }


def _child(name: str) -> Object:
    container = {"name": "pytorch", "image": "localhost/trainer:1"}
    master = {"replicas": 1, "template": {"spec": {"containers": [container]}}}
    return _named("PyTorchJob", name, spec={"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Master": master}})


def _event(name: str, namespace: str) -> Object:
    about = {"kind": "DPOJob", "name": "job", "namespace": namespace, "apiVersion": DPOJOBS[0]}
    return _named("Event", name, reason="Accepted", message="x", type="Normal", involvedObject=about)


def _network_policy(name: str) -> Object:
    return _named("NetworkPolicy", name, spec={"podSelector": {}})


async def lists(stage: Stage, resource: Resource) -> None:
    """The comparison that fills the caches and finds dead watches."""

    async def revive(reason: str) -> None:
        raise AssertionError(reason)  # there are no watches here

    watchdog = Watchdog(
        stage.client, stage.cache, [stage.jobs.namespace], lambda _: None, revive, interval=60, dead_after=60
    )
    watchdog.resources = (resource,)
    await watchdog.compare()


async def watches(stage: Stage, resource: Resource) -> None:
    """The request by which kopf watches a kind."""
    params = {"watch": "true", "timeoutSeconds": "1", "labelSelector": resource.selector}
    try:
        await stage.client.request("GET", resource.path(stage.jobs.namespace), params=params)
    except Unreachable as error:
        # It was allowed: a watch answers with lines, of which there may be none.
        assert "not JSON" in str(error)  # noqa: PT017 - any other would be a failure of the connection


async def job_get(stage: Stage) -> None:
    """A status write of an old version: the newer object is read."""
    body = {"metadata": {"resourceVersion": "1"}, "status": {"message": "old"}}
    with pytest.raises(Outdated):
        await stage.perform(PatchStatus(body))


async def job_delete(stage: Stage) -> None:
    """The end of ttlSecondsAfterFinished."""
    await stage.perform(DeleteJob("job", "another-uid"))
    assert "deletionTimestamp" not in stage.jobs.get()["metadata"], "another one of its name stays"


async def status_patch(stage: Stage) -> None:
    """The one status write of a pass."""
    version = stage.jobs.get()["metadata"]["resourceVersion"]
    await stage.perform(PatchStatus({"metadata": {"resourceVersion": version}, "status": {"message": "seen"}}))


async def child_get(stage: Stage) -> None:
    """A child that the cache does not show is looked up before it counts as gone."""
    await stage.perform(LookUpChild("job-9"))


async def child_create(stage: Stage) -> None:
    """The start of an attempt."""
    await stage.perform(CreateChild(_child("job-2")))


async def child_delete(stage: Stage) -> None:
    """A suspension, or the trimming of the history."""
    await stage.perform(DeleteChild("job-1", "another-uid"))
    uid = stage.jobs.children()["job-1"]["metadata"]["uid"]  # another one of its name stays
    await stage.perform(DeleteChild("job-1", uid))
    assert "job-1" not in stage.jobs.children()


async def config_map_create(stage: Stage) -> None:
    """The pinning of a spec."""
    await stage.perform(CreateConfigMap(_named("ConfigMap", "pin-2", immutable=True)))


async def config_map_get(stage: Stage) -> None:
    """The pinning of a spec by an operator that was killed right after it did so."""
    await stage.perform(CreateConfigMap(_named("ConfigMap", "pin-1", immutable=True)))


async def network_policy_create(stage: Stage) -> None:
    """The restriction of who reaches a job's pods."""
    await stage.perform(CreateNetworkPolicy(_network_policy("network-2")))


async def network_policy_get(stage: Stage) -> None:
    """The same before the next attempt: the policy exists."""
    await stage.perform(CreateNetworkPolicy(_network_policy("network-1")))


async def event_create(stage: Stage) -> None:
    """The event of a transition. No job waits for it, so the refusal shows only in the missing event."""
    await stage.perform(EmitEvent(_event("reported", stage.jobs.namespace)))
    if stage.jobs.api.find(("v1", "events"), stage.jobs.namespace, "reported") is None:
        raise ApiError(403, "Forbidden", "no event was made")


async def event_list(stage: Stage) -> None:
    """The message about a refused pod, which is only in an event."""
    params = {"fieldSelector": "involvedObject.uid=x,type=Warning", "limit": "50"}
    await stage.client.request("GET", EVENTS.path(stage.jobs.namespace), params=params)


async def proxy_get(stage: Stage) -> None:
    """The question for progress, from outside the cluster. No pod answers here, but the API server lets it through."""
    scraper = Scraper(stage.client, "api-proxy", lambda _: None, interval=60, write_interval=60)
    target = ScrapeTarget(child="job-1", namespace=stage.jobs.namespace, pod="job-1-master-0", ip="", port=9400)
    scraper.aim((stage.jobs.namespace, "job"), target)
    while (answer := scraper.newest((stage.jobs.namespace, "job"))) is None:
        await asyncio.sleep(0.05)
    await scraper.close()
    if "403" in answer.error:
        raise ApiError(403, "Forbidden", answer.error)


OURS, THEIRS = JOBS.group, CHILDREN.group
SCENARIOS: dict[Right, Callable[[Stage], Awaitable[None]]] = {
    (OURS, "dpojobs", "get"): job_get,
    (OURS, "dpojobs", "list"): lambda stage: lists(stage, JOBS),
    (OURS, "dpojobs", "watch"): lambda stage: watches(stage, JOBS),
    (OURS, "dpojobs", "delete"): job_delete,
    (OURS, "dpojobs/status", "patch"): status_patch,
    (THEIRS, "pytorchjobs", "get"): child_get,
    (THEIRS, "pytorchjobs", "list"): lambda stage: lists(stage, CHILDREN),
    (THEIRS, "pytorchjobs", "watch"): lambda stage: watches(stage, CHILDREN),
    (THEIRS, "pytorchjobs", "create"): child_create,
    (THEIRS, "pytorchjobs", "delete"): child_delete,
    ("", "pods", "list"): lambda stage: lists(stage, PODS),
    ("", "pods", "watch"): lambda stage: watches(stage, PODS),
    ("", "configmaps", "get"): config_map_get,
    ("", "configmaps", "create"): config_map_create,
    ("networking.k8s.io", "networkpolicies", "get"): network_policy_get,
    ("networking.k8s.io", "networkpolicies", "create"): network_policy_create,
    ("", "events", "create"): event_create,
    ("", "events", "list"): event_list,
    ("", "pods/proxy", "get"): proxy_get,
}
"""What the operator does with each right, by its own code."""


def test_every_right_has_a_scenario() -> None:
    assert set(SCENARIOS) == RIGHTS


def lacking(right: Right) -> list[rbac.Rule]:
    """Return the table without one right."""
    group, resource, verb = right
    kept = [
        replace(rule, verbs=tuple(v for v in rule.verbs if (rule.group, rule.resource, v) != (group, resource, verb)))
        for rule in rbac.RULES
    ]
    return [rule for rule in kept if rule.verbs]


@pytest.mark.parametrize("right", sorted(SCENARIOS), ids=lambda right: f"{right[2]} {right[1]}")
def test_a_scenario_fails_without_its_right(cluster: ControlPlane, namespace: str, right: Right) -> None:
    jobs = Jobs(cluster.admin, namespace)
    body = manifest("job", run_policy={"suspend": True})
    jobs.create(body)
    cluster.admin.create(PYTORCHJOBS, namespace, _child("job-1"))
    cluster.admin.create(("v1", "configmaps"), namespace, _named("ConfigMap", "pin-1", immutable=True))
    cluster.admin.create(NETWORK_POLICIES, namespace, _network_policy("network-1"))
    whole = account(cluster, namespace, rbac.role(namespace, name="whole", outside=True), name="whole")
    reduced = account(
        cluster, namespace, rbac.role(namespace, name="reduced", outside=True, rules=lacking(right)), name="reduced"
    )
    other = next(kept for kept in sorted(RIGHTS) if kept != right)
    for who, asked in ((whole, right), (reduced, other)):
        eventually(lambda who=who, asked=asked: may(cluster, who, *asked), what=f"the role {who.name}")  # type: ignore[misc]

    async def play(who: Account) -> None:
        async with client_of(cluster, who) as client:
            await SCENARIOS[right](Stage(client, jobs))

    with pytest.raises(ApiError) as refused:
        asyncio.run(play(reduced))
    assert refused.value.status == 403
    asyncio.run(play(whole))


# --- what --selfcheck says of it -------------------------------------------------------------------------------------


def selfcheck(kubeconfig: Path, namespaces: str, *flags: str) -> tuple[int, list[str]]:
    """Run the operator's self-check; return its exit code and lines."""
    command = [sys.executable, "-m", "dpo_operator", "--selfcheck", f"--kubeconfig={kubeconfig}", *flags]
    command.append(f"--namespaces={namespaces}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_the_selfcheck_finds_the_shipped_role_enough(cluster: ControlPlane, namespace: str) -> None:
    who = account(cluster, namespace, rbac.role(namespace))
    eventually(lambda: may(cluster, who, "", "events", "list"), what="the authorizer knows the role")
    code, lines = selfcheck(who.kubeconfig(cluster), namespace, "--scrape-by=pod-ip")
    assert (code, lines[-1]) == (0, "selfcheck: all is there")
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", "cluster"], ["ok", "kind"], ["ok", "kind"], ["ok", "rights"]
    ]  # fmt: skip
    assert f"{cluster.url} is Kubernetes v1." in lines[0]
    assert f"{namespace}: all {len(RIGHTS) - 1} " in lines[3]
    # Out of the cluster trainers are asked through the API server, for which the shipped role has no right.
    code, lines = selfcheck(who.kubeconfig(cluster), namespace)
    assert code == 1
    assert [line for line in lines if "cannot" in line] == [line for line in lines if "get pods/proxy" in line] != []
    # A Role is not for all namespaces.
    code, lines = selfcheck(who.kubeconfig(cluster), "")
    assert (code, lines[-1]) == (1, f"selfcheck: {len(RIGHTS)} lacking")
    assert all("all namespaces: cannot" in line for line in lines if line.startswith("lacks"))


@pytest.mark.parametrize(
    "right", [("", "pods", "watch"), pytest.param((OURS, "dpojobs/status", "patch"), marks=pytest.mark.nightly)]
)
def test_the_selfcheck_names_the_right_that_is_missing(cluster: ControlPlane, namespace: str, right: Right) -> None:
    who = account(cluster, namespace, rbac.role(namespace, rules=lacking(right)))
    eventually(lambda: may(cluster, who, "", "events", "list"), what="the authorizer knows the role")
    code, lines = selfcheck(who.kubeconfig(cluster), namespace, "--scrape-by=pod-ip")
    assert (code, lines[-1]) == (1, "selfcheck: 1 lacking")
    (line,) = [line for line in lines if line.startswith("lacks")]
    assert f"{namespace}: cannot {right[2]} {right[1]} (to " in line
    assert "rbac.create" in line


def test_the_selfcheck_names_the_kinds_that_are_missing(cluster: ControlPlane, namespace: str) -> None:
    with ChaosProxy(cluster.url, cluster.tls()) as proxy:
        hidden = ("/apis/kubeflow.org", f"/apis/{OURS}/v1alpha1")
        proxy.rules[:] = [lambda call: Fault(status=404) if call.path.startswith(hidden) else None]
        kubeconfig = cluster.identity("admin", ["system:masters"], server=proxy.url)
        code, lines = selfcheck(kubeconfig, namespace)
    assert (code, lines[-1]) == (1, "selfcheck: 2 lacking")
    ours, theirs = [line for line in lines if line.startswith("lacks")]
    assert f"has no dpojobs of {OURS}/v1alpha1 (it serves {OURS}/v1alpha1)" in ours
    assert "crds/dpojobs.yaml" in ours
    assert "has no pytorchjobs of kubeflow.org/v1; install training-operator" in theirs
