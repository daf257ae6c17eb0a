"""Service accounts of a real API server, with tokens, and what its authorizer says of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dpo_operator import rbac
from dpo_testing.controlplane import ControlPlane
from dpo_testing.kubeapi import Object, path_of

_ACCOUNTS = ("v1", "serviceaccounts")
RBAC = "rbac.authorization.k8s.io/v1"
ACCOUNT = "dpo-operator"


@dataclass(frozen=True)
class Account:
    """A service account with a token, which holds some of the table's rules."""

    name: str
    namespace: str
    token: str

    def kubeconfig(self, cluster: ControlPlane, *, server: str | None = None) -> Path:
        """Return a kubeconfig with the token, at ``server`` (a proxy) or the API server itself."""
        config = json.loads(cluster.kubeconfig.read_text())
        if server is not None:
            config["clusters"][0]["cluster"] = {"server": server}
        config["users"][0]["user"] = {"token": self.token}
        path = cluster.folder / f"{self.namespace}-{self.name}.kubeconfig"
        path.write_text(json.dumps(config))
        return path


def account(
    cluster: ControlPlane, namespace: str, role: Object, *, name: str = ACCOUNT, everywhere: bool = False
) -> Account:
    """Make a service account and bind a Role, or with ``everywhere`` a ClusterRole, to it as shipped."""
    api = cluster.admin
    api.create(_ACCOUNTS, namespace, {"metadata": {"name": name}})
    bound = rbac.binding(None if everywhere else namespace, account=name, account_namespace=namespace, name=name)
    where, kinds = (
        (None, ("clusterroles", "clusterrolebindings")) if everywhere else (namespace, ("roles", "rolebindings"))
    )
    for kind, body in zip(kinds, (role, bound), strict=True):
        api.apply((RBAC, kind), where, body)
    return Account(name, namespace, token(cluster, namespace, name))


def token(cluster: ControlPlane, namespace: str, name: str) -> str:
    """Return a token of a service account that exists."""
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    answer = cluster.admin.call("POST", path_of(_ACCOUNTS, namespace, name, "token"), request)
    return str(answer["status"]["token"])


def may(cluster: ControlPlane, who: Account, group: str, resource: str, verb: str, namespace: str = "") -> bool:
    """Ask the API server's authorizer."""
    resource, _, sub = resource.partition("/")
    attributes = {"group": group, "resource": resource, "subresource": sub, "verb": verb}
    attributes["namespace"] = namespace or who.namespace
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": f"system:serviceaccount:{who.namespace}:{who.name}", "resourceAttributes": attributes},
    }
    answer = cluster.admin.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(answer["status"]["allowed"])
