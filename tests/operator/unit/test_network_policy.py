"""Who can connect to a job's pods: the policies are evaluated, since no network here enforces them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from dpo_operator import labels
from dpo_operator.backend.network import build_network_policy
from dpo_operator.backend.pytorchjob import Identity
from dpo_operator.config import Settings
from dpo_operator.types import Refusal
from dpo_testing.networkpolicies import Peer, allows
from dpo_testing.simcluster import Crash, SimCluster

JOB = Identity(name="job", namespace="team", uid="uid-1", created=1)
OPERATOR = {"app.kubernetes.io/name": "dpo-operator", "app.kubernetes.io/component": "operator"}
SETTINGS = Settings(
    operator_namespace="dpo-system",
    operator_labels=tuple(OPERATOR.items()),
    metrics_from=(
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
        {"ipBlock": {"cidr": "10.1.0.0/16", "except": ["10.1.9.0/24"]}},
    ),
)
OWN = labels.of_attempt("job", "uid-1", 2)
METRICS, RENDEZVOUS = 9400, 23456


@pytest.mark.parametrize(
    ("peer", "metrics", "rendezvous"),
    [
        (Peer("team", OWN), True, True),
        (Peer("team", labels.of_attempt("job", "uid-1", 1)), True, True),
        (Peer("team", labels.of_attempt("job", "uid-2", 1)), False, False),  # a deleted job of the same name
        (Peer("team", labels.of_attempt("other", "uid-3", 1)), False, False),
        (Peer("team", {"dpo-operator.dev/job": "job"}), False, False),
        (Peer("team", {}), False, False),
        (Peer("elsewhere", OWN), False, False),  # the label alone does not help in another namespace
        (Peer("dpo-system", OPERATOR), True, False),
        (Peer("dpo-system", {"app.kubernetes.io/name": "other"}), False, False),
        (Peer("team", OPERATOR), False, False),
        (Peer("monitoring", {"app": "prometheus"}), True, False),
        (Peer("default", {"app": "prometheus"}), False, False),
        (Peer(ip="10.1.2.3"), True, False),
        (Peer(ip="10.1.9.3"), False, False),
        (Peer(ip="192.0.2.1"), False, False),
    ],
    ids=str,
)
def test_who_can_connect(peer: Peer, metrics: bool, rendezvous: bool) -> None:
    policy = build_network_policy(JOB, SETTINGS)
    for port, allowed in ((METRICS, metrics), (RENDEZVOUS, rendezvous), (40_000, rendezvous)):
        assert allows([policy], "team", OWN, peer, port) is allowed, port


def test_other_pods_are_not_restricted() -> None:
    policy = build_network_policy(JOB, SETTINGS)
    anyone = Peer("default", {})
    assert allows([policy], "team", labels.of_attempt("other", "uid-3", 1), anyone, RENDEZVOUS)
    assert allows([policy], "elsewhere", OWN, anyone, RENDEZVOUS)


def test_without_clients_the_metrics_port_is_closed_and_not_open_to_all() -> None:
    policy = build_network_policy(JOB, Settings())
    assert not allows([policy], "team", OWN, Peer("monitoring", {}), METRICS)
    assert allows([policy], "team", OWN, Peer("team", OWN), METRICS)


def test_a_rendered_policy_selects_the_rendered_pods_alone() -> None:
    policy = build_network_policy(Identity(name="job", namespace=None, uid=""), Settings())
    pod = labels.of_attempt("job", "", 1)
    assert not allows([policy], "default", pod, Peer("default", {}), RENDEZVOUS)
    assert allows([policy], "default", pod, Peer("default", pod), RENDEZVOUS)
    assert allows([policy], "default", {"app": "web"}, Peer("default", {}), 80)


# -- its life ---------------------------------------------------------------------------------------------------------


def name_of(cluster: SimCluster) -> str:
    """Return the name of the policy that the cluster's job should have."""
    identity = Identity(name="job", namespace="team", uid="uid-1", created=1)
    return str(build_network_policy(identity, cluster.settings)["metadata"]["name"])


def test_the_policy_is_created_before_the_first_attempt_and_once() -> None:
    cluster = SimCluster()
    cluster.run_to("Running")
    calls = [call for call in cluster.calls if call.startswith("Create")]
    assert calls == ["CreateConfigMap", "CreateNetworkPolicy", "CreateChild"]
    ((name, policy),) = cluster.network_policies.items()
    assert cluster.status["networkPolicy"] == name == name_of(cluster)
    (owner,) = policy["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("DPOJob", "uid-1", True)


def test_a_deleted_policy_is_back_with_the_next_attempt() -> None:
    cluster = SimCluster()
    cluster.run_to("Running")
    cluster.network_policies.clear()
    cluster.lose_attempt(1)
    assert list(cluster.network_policies) == [name_of(cluster)]


@pytest.mark.parametrize("budget", range(5))
def test_an_operator_that_is_killed_adopts_what_it_created(budget: int) -> None:
    cluster = SimCluster()
    with contextlib.suppress(Crash):
        cluster.reconcile(budget=budget)
    cluster.run_to("Running")
    assert list(cluster.network_policies) == [name_of(cluster)]
    assert cluster.created == ["job-1"]


def test_a_running_job_of_an_earlier_version_gets_its_policy_and_is_not_disturbed() -> None:
    cluster = earlier()
    before = dict(cluster.status)
    cluster.settle()
    assert list(cluster.network_policies) == [cluster.status["networkPolicy"]] == [name_of(cluster)]
    assert cluster.status == before | {"networkPolicy": name_of(cluster)}
    assert (cluster.created, cluster.deleted) == (["job-1"], [])


def test_other_settings_add_a_policy_to_a_running_job() -> None:
    """Otherwise an operator that has moved, or a new Prometheus, could not reach the trainers until the job ends."""
    cluster = SimCluster()
    cluster.run_to("Running")
    cluster.settings = Settings(trainer_image="trainer:test", operator_namespace="moved")
    cluster.settle()
    assert len(cluster.network_policies) == 2
    assert cluster.status["networkPolicy"] == name_of(cluster)
    moved = Peer("moved", {})
    assert allows(cluster.network_policies.values(), "team", OWN, moved, METRICS)


def test_no_policy_is_created_where_they_are_off() -> None:
    cluster = SimCluster(settings=Settings(trainer_image="trainer:test", network_policies=False))
    cluster.run_to("Running")
    assert cluster.network_policies == {}
    assert "networkPolicy" not in cluster.status


def test_a_refused_policy_keeps_the_job_waiting() -> None:
    cluster = SimCluster()
    cluster.refuse[name_of(cluster)] = Refusal(403, "exceeded quota: count/networkpolicies")
    cluster.settle()
    assert (cluster.state, cluster.created) == ("Pending", [])
    assert cluster.condition("Progressing") == ("False", "ChildRefused")
    assert "NetworkPolicy job-network-" in cluster.status["message"]
    assert "exceeded quota" in cluster.status["message"]
    cluster.refuse.clear()
    cluster.sleep()
    cluster.run_to("Running")


def test_a_policy_of_another_owner_is_named() -> None:
    cluster = SimCluster()
    cluster.network_policies[name_of(cluster)] = {"metadata": {"name": name_of(cluster)}}
    cluster.settle()
    assert (cluster.state, cluster.created) == ("Pending", [])
    assert cluster.condition("Progressing") == ("False", "ChildNameTaken")
    assert f"NetworkPolicy {name_of(cluster)} already exists" in cluster.status["message"]


def test_a_running_job_continues_without_a_refused_policy_and_says_so() -> None:
    cluster = earlier()
    cluster.refuse[name_of(cluster)] = Refusal(403, "networkpolicies is forbidden")
    cluster.settle()
    assert (cluster.state, cluster.created, cluster.deleted) == ("Running", ["job-1"], [])
    assert cluster.condition("NetworkRestricted") == ("False", "ChildRefused")
    assert cluster.event_reasons().count("ChildRefused") == 1
    cluster.sleep()
    assert cluster.event_reasons().count("ChildRefused") == 1
    cluster.refuse.clear()
    cluster.sleep()
    assert cluster.condition("NetworkRestricted") is None
    assert cluster.status["networkPolicy"] == name_of(cluster)


def earlier() -> SimCluster:
    """Return a cluster with a running job of version 0.1.0, which created no NetworkPolicies."""
    cluster = SimCluster(settings=Settings(trainer_image="trainer:test", network_policies=False))
    cluster.run_to("Running")
    cluster.settings = Settings(trainer_image="trainer:test")
    return cluster


def test_selectors_of_a_job_cannot_be_changed_by_the_installations_labels() -> None:
    settings = Settings(labels=(("dpo-operator.dev/job-uid", "x"),))
    policy: Any = build_network_policy(JOB, settings)
    assert policy["spec"]["podSelector"] == {"matchLabels": {"dpo-operator.dev/job-uid": "uid-1"}}
    assert policy["metadata"]["labels"]["dpo-operator.dev/job-uid"] == "uid-1"
