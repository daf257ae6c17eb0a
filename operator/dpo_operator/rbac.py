"""The permissions of the operator: one table. The Role, the ClusterRole and the chart are generated from it.

It reads no Secrets, and changes neither specs nor pods. ``python -m dpo_operator.rbac`` prints the ClusterRole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

NAME = "dpo-operator"


@dataclass(frozen=True)
class Rule:
    """Verbs on one resource, and what they are for."""

    group: str
    """API group; empty for the core group."""
    resource: str
    verbs: tuple[str, ...]
    why: str
    outside_only: bool = False
    """Needed only by an operator that runs outside the cluster."""


RULES: tuple[Rule, ...] = (
    Rule("dpo-operator.dev", "dpojobs", ("get", "list", "watch"), "to watch the jobs"),
    Rule("dpo-operator.dev", "dpojobs", ("delete",), "runPolicy.ttlSecondsAfterFinished"),
    Rule("dpo-operator.dev", "dpojobs/status", ("patch",), "to update the status of a job"),
    Rule("kubeflow.org", "pytorchjobs", ("get", "list", "watch"), "to watch the attempts"),
    Rule("kubeflow.org", "pytorchjobs", ("create",), "to start an attempt"),
    Rule(
        "kubeflow.org",
        "pytorchjobs",
        ("delete",),
        "to suspend a job, to end an attempt, to trim the history",
    ),
    Rule("", "pods", ("list", "watch"), "to see the state of an attempt's pods and how they ended"),
    Rule("", "configmaps", ("get", "create"), "to pin a job's spec and image, and to check it before each attempt"),
    Rule("networking.k8s.io", "networkpolicies", ("get", "create"), "to restrict who reaches a job's pods"),
    Rule("", "events", ("create",), "to report transitions"),
    Rule("", "events", ("list",), "to report why pods are refused"),
    Rule("", "pods/proxy", ("get",), "to ask trainers for progress through the API server", outside_only=True),
)


AUTHENTICATION: tuple[Rule, ...] = (
    Rule("authentication.k8s.io", "tokenreviews", ("create",), "to check the tokens of those who read /metrics"),
    Rule("authorization.k8s.io", "subjectaccessreviews", ("create",), "to check that they may"),
)
"""What ``--metrics-auth=token`` needs besides, in a ClusterRole: these kinds have no namespaces."""


def policy_rules(*, outside: bool = False, rules: Iterable[Rule] = RULES) -> list[dict[str, Any]]:
    """Return the table as RBAC rules, one for each group and resource. ``outside``: those needed outside too."""
    verbs: dict[tuple[str, str], list[str]] = {}
    for rule in rules:
        if outside or not rule.outside_only:
            verbs.setdefault((rule.group, rule.resource), []).extend(rule.verbs)
    return [
        {"apiGroups": [group], "resources": [resource], "verbs": list(dict.fromkeys(found))}
        for (group, resource), found in verbs.items()
    ]


def cluster_role(*, name: str = NAME, outside: bool = False, rules: Iterable[Rule] = RULES) -> dict[str, Any]:
    """Return the ClusterRole of an operator that serves all namespaces."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": name},
        "rules": policy_rules(outside=outside, rules=rules),
    }


def role(namespace: str, *, name: str = NAME, outside: bool = False, rules: Iterable[Rule] = RULES) -> dict[str, Any]:
    """Return the Role that an operator needs in each namespace that it serves, if it does not serve all."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": name, "namespace": namespace},
        "rules": policy_rules(outside=outside, rules=rules),
    }


def binding(namespace: str | None, *, account: str, account_namespace: str, name: str = NAME) -> dict[str, Any]:
    """Return the binding of the Role of a namespace, or of the ClusterRole (None), to a service account."""
    kind = "ClusterRole" if namespace is None else "Role"
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": f"{kind}Binding",
        "metadata": {"name": name} | ({} if namespace is None else {"namespace": namespace}),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": account_namespace}],
    }


if __name__ == "__main__":
    yaml.safe_dump(cluster_role(), sys.stdout, sort_keys=False)
