"""training-operator in the cluster, from its own manifests: one kind of job, and probes that do not dawdle."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from dpo_testing.controlplane import pytorchjob_crd
from dpo_testing.kubeapi import eventually
from dpo_testing.realcluster.layout import BUSYBOX_IMAGE, TRAINING_OPERATOR_IMAGE

if TYPE_CHECKING:
    from dpo_testing.realcluster.cluster import Cluster

NAMESPACE = "kubeflow"
TEMPLATE = "training-operator-init-container"
"""The ConfigMap that our chart makes on request. Until it does, training-operator uses its own init container."""

_OVERLAY = "overlays/standalone"
_OTHER_KINDS = ("mpijobs", "tfjobs", "xgboostjobs", "paddlejobs", "jaxjobs")


def install(cluster: Cluster) -> None:
    """Apply its manifests and wait until its webhook answers."""
    folder = cluster.layout.run / "training-operator"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pytorchjob_crd().parents[2], folder, copy_function=shutil.copyfile)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    overlay = folder / _OVERLAY
    name, _, tag = TRAINING_OPERATOR_IMAGE.rpartition(":")
    images = [{"name": "ghcr.io/kubeflow/training-v1/training-operator", "newName": name, "newTag": tag}]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": NAMESPACE,
        "resources": ["../../base", "namespace.yaml"],
        "images": images,
        "secretGenerator": [
            {"name": "training-operator-webhook-cert", "options": {"disableNameSuffixHash": True}},
        ],
        "patches": [{"path": "deployment.json"}],
    }  # fmt: skip
    (overlay / "kustomization.yaml").write_text(json.dumps(kustomization))
    (overlay / "deployment.json").write_text(json.dumps(_deployment()))
    crds = folder / "base" / "crds" / "kustomization.yaml"
    kept = [line for line in crds.read_text().splitlines() if not any(kind in line for kind in _OTHER_KINDS)]
    crds.write_text("\n".join(kept) + "\n")
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(overlay))
    wait(cluster)


def wait(cluster: Cluster) -> None:
    """Wait until it runs and its webhook takes a job."""
    cluster.kubectl("-n", NAMESPACE, "rollout", "status", "deployment/training-operator", "--timeout=120s")
    eventually(lambda: _takes_jobs(cluster), seconds=60, what="training-operator's webhook answers")


def restart(cluster: Cluster) -> None:
    """Make training-operator read its template again."""
    cluster.kubectl("-n", NAMESPACE, "rollout", "restart", "deployment/training-operator")
    wait(cluster)


def _takes_jobs(cluster: Cluster) -> bool:
    container = {"name": "pytorch", "image": "localhost/probe:1"}
    template = {"spec": {"containers": [container]}}
    probe = {
        "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "probe", "namespace": "default"},
        "spec": {"pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}}},
    }  # fmt: skip
    answer = cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(probe), check=False)
    return "created (server dry run)" in answer


def _deployment() -> dict[str, object]:
    """The patch: its template may come from our chart; it is ready a second after it is."""
    quick = {"initialDelaySeconds": 1, "periodSeconds": 1}
    container = {
        "name": "training-operator",
        "args": ["--enable-scheme=pytorchjob", f"--pytorch-init-container-image={BUSYBOX_IMAGE}"],
        "readinessProbe": quick,
        "volumeMounts": [{"name": "init-container", "mountPath": "/etc/config", "readOnly": True}],
    }
    # Optional: without it training-operator falls back to the init container that restricted namespaces refuse.
    volume = {"name": "init-container", "configMap": {"name": TEMPLATE, "optional": True}}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "training-operator"},
        "spec": {
            "strategy": {"type": "Recreate", "rollingUpdate": None},
            "template": {"spec": {"containers": [container], "volumes": [volume]}},
        },
    }  # fmt: skip
