"""The NetworkPolicy of a job: who may connect to its pods.

The rendezvous and the collectives authenticate nobody. So the pods of a job accept connections from each other
only; rank 0's metrics port accepts the operator and the installation's ``metrics_from`` too. Egress is free.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_operator import labels, names
from dpo_operator.backend.pytorchjob import Identity, object_metadata
from dpo_operator.config import Settings

API_VERSION = "networking.k8s.io/v1"
NAMESPACE_NAME = "kubernetes.io/metadata.name"
"""The label by which the API server names each namespace; nobody else can set it."""

_PEER_FIELDS = frozenset({"podSelector", "namespaceSelector", "ipBlock"})


def build_network_policy(identity: Identity, settings: Settings) -> dict[str, Any]:
    """Return the NetworkPolicy of a job. Its name depends on its rules, so other settings make another object."""
    pods = {"podSelector": {"matchLabels": _own_pods(identity)}}
    ingress: list[dict[str, Any]] = [{"from": [pods]}]  # rendezvous and collectives use any port
    clients = [*_operator(settings), *copy.deepcopy(list(settings.metrics_from))]
    if clients:  # a rule with an empty ``from`` would allow everybody
        ingress.append({"ports": [{"protocol": "TCP", "port": settings.trainer_port}], "from": clients})
    spec = {**pods, "policyTypes": ["Ingress"], "ingress": ingress}
    name = names.network_policy(identity.name, identity.uid, json.dumps(spec, sort_keys=True))
    return {
        "apiVersion": API_VERSION,
        "kind": "NetworkPolicy",
        "metadata": object_metadata(identity, name, labels.of_job(identity.name, identity.uid), settings),
        "spec": spec,
    }


def _own_pods(identity: Identity) -> dict[str, str]:
    """A job that is only rendered has no UID; its pods still have its name."""
    return {labels.JOB_UID: identity.uid} if identity.uid else {labels.JOB: identity.name}


def _operator(settings: Settings) -> list[dict[str, Any]]:
    if not settings.operator_namespace:
        return []
    where = {"namespaceSelector": {"matchLabels": {NAMESPACE_NAME: settings.operator_namespace}}}
    return [{**where, "podSelector": {"matchLabels": dict(settings.operator_labels)}}]


def peers(document: object) -> tuple[Mapping[str, Any], ...]:
    """Return a list of NetworkPolicyPeers as settings hold it. Raises ValueError, in one sentence, for anything else.

    The API server checks the selectors themselves.
    """
    if not isinstance(document, list):
        raise ValueError("it is not a list")  # noqa: TRY004 - a value of a flag, not of the code
    for number, peer in enumerate(document, 1):
        if not isinstance(peer, dict) or not peer:
            raise ValueError(f"entry {number} is not an object with {_listed(_PEER_FIELDS)}")
        unknown = peer.keys() - _PEER_FIELDS
        if unknown:
            raise ValueError(f"entry {number} has {_listed(unknown)}; a peer has {_listed(_PEER_FIELDS)}")
    return tuple(document)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))
