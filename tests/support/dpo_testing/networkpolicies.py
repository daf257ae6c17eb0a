"""Evaluates NetworkPolicies as a network that enforces them does: who may connect to a pod on which port."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """What connects: a pod with labels in a namespace, or an address outside the cluster."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    ip: str = ""

    def __str__(self) -> str:
        return self.ip or f"{self.namespace}/" + ",".join(f"{k.rpartition('/')[2]}={v}" for k, v in self.labels.items())


def allows(
    policies: Iterable[Object], namespace: str, labels: Mapping[str, str], peer: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Tell whether ``peer`` may connect to the pod with ``labels`` in ``namespace``.

    A pod that no policy selects accepts every connection; otherwise one policy has to allow it. Named ports are not
    evaluated.
    """
    chosen = [
        policy["spec"]
        for policy in policies
        if (policy["metadata"].get("namespace") or namespace) == namespace
        and matches(policy["spec"]["podSelector"], labels)
        and "Ingress" in policy["spec"].get("policyTypes", ["Ingress"])
    ]
    if not chosen:
        return True
    rules = [rule for spec in chosen for rule in spec.get("ingress") or ()]
    return any(_port(rule, port, protocol) and _from(rule, namespace, peer) for rule in rules)


def _port(rule: Object, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    if not ports:
        return True
    return any(
        entry.get("protocol", "TCP") == protocol
        and ("port" not in entry or int(entry["port"]) <= port <= int(entry.get("endPort", entry["port"])))
        for entry in ports
    )


def _from(rule: Object, namespace: str, peer: Peer) -> bool:
    return not rule.get("from") or any(_is(entry, namespace, peer) for entry in rule["from"])


def _is(entry: Object, namespace: str, peer: Peer) -> bool:
    block = entry.get("ipBlock")
    if block is not None:
        if not peer.ip:
            return False
        address = ipaddress.ip_address(peer.ip)
        excluded = any(address in ipaddress.ip_network(one) for one in block.get("except") or ())
        return address in ipaddress.ip_network(block["cidr"]) and not excluded
    if peer.ip:
        return False
    if "namespaceSelector" in entry:
        if not matches(entry["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace}):
            return False
    elif peer.namespace != namespace:
        return False
    return matches(entry.get("podSelector") or {}, peer.labels)


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """Tell whether a label selector selects something with these labels; an empty one selects everything."""
    wanted: Mapping[str, str] = selector.get("matchLabels") or {}
    return all(labels.get(name) == value for name, value in wanted.items()) and all(
        _holds(expression, labels) for expression in selector.get("matchExpressions") or ()
    )


def _holds(expression: Object, labels: Mapping[str, str]) -> bool:
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or ()
    match operator:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    raise ValueError(f"unknown operator {operator!r}")
