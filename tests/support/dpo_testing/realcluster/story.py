"""What the story puts on a cluster, and takes away again. What others put there it neither changes nor deletes."""

from __future__ import annotations

import os

from dpo_testing.kubeapi import DPOJOBS
from dpo_testing.realcluster import objectstore, release, trainingoperator
from dpo_testing.realcluster.cluster import Cluster

JOBS = "dpo-e2e-jobs"
"""The namespace of the jobs."""
NEEDED = (
    "E2E_OPERATOR_IMAGE", "E2E_TRAINER_IMAGE", "E2E_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
)  # fmt: skip
"""Environment variables without which a given cluster is of no use."""

_NAMESPACES = ("v1", "namespaces")
_DEFINITIONS = ("apiextensions.k8s.io/v1", "customresourcedefinitions")
_DEFINITION = f"{DPOJOBS[1]}.{DPOJOBS[0].partition('/')[0]}"


def lacking() -> list[str]:
    """Return the variables that a given cluster needs and that are not set."""
    return [name for name in NEEDED if not os.environ.get(name)]


def refusal(cluster: Cluster) -> str | None:
    """Return what is on the cluster that the story would change though it is not its own, and what to do; or None."""
    definition = cluster.api.find(_DEFINITIONS, None, _DEFINITION)
    if definition is not None and not _is_ours(cluster):
        return (
            f"the cluster has the definition {_DEFINITION}, which is not of the release {release.NAME} in"
            f" {release.NAMESPACE}: another installation, which the story would change. Use another cluster, or"
            " uninstall it and delete the definition"
        )
    for name in (release.NAMESPACE, JOBS):
        if cluster.api.find(_NAMESPACES, None, name) is not None and name not in _namespaces(cluster):
            return f"the cluster has a namespace {name} without the story's label {release.OURS}; delete it yourself"
    return None


def take_away(cluster: Cluster) -> None:
    """Take away what a story left: release, namespaces, objects in the bucket, and the definition if nobody uses it."""
    namespaces = _namespaces(cluster)
    if namespaces or _is_ours(cluster):
        with cluster.steps.step("what a story left is taken away"):
            if release.NAMESPACE in namespaces:
                release.uninstall(cluster, "--ignore-not-found")
            if namespaces:
                cluster.kubectl("delete", "namespace", *namespaces, "--wait")
            if _is_ours(cluster) and not cluster.api.list(DPOJOBS):
                cluster.kubectl("delete", "crd", _DEFINITION, "--wait")
            if cluster.given is None:
                trainingoperator.restart(cluster)
    objectstore.empty(cluster.layout)


def _namespaces(cluster: Cluster) -> list[str]:
    """Return those of the story's namespaces that the story made."""
    found = {each["metadata"]["name"] for each in cluster.api.list(_NAMESPACES, labelSelector=release.OURS)}
    return [name for name in (JOBS, release.NAMESPACE) if name in found]


def _is_ours(cluster: Cluster) -> bool:
    """Whether the definition of DPOJob is there and came with the story's release."""
    definition = cluster.api.find(_DEFINITIONS, None, _DEFINITION)
    notes = (definition or {"metadata": {}})["metadata"].get("annotations", {})
    release_of = tuple(notes.get(f"meta.helm.sh/release-{part}") for part in ("name", "namespace"))
    return release_of == (release.NAME, release.NAMESPACE)
