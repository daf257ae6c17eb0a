"""The product in the cluster: our chart, installed and changed by Helm as its users do it."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from dpo_testing.realcluster.cluster import OPERATOR_IMAGE, TRAINER_IMAGE, Cluster
from dpo_testing.realcluster.layout import REPOSITORY
from dpo_testing.realcluster.trainingoperator import TEMPLATE

CHART = REPOSITORY / "charts" / "dpo-operator"
NAME = "dpo-e2e"
NAMESPACE = "dpo-e2e-system"
OURS = "dpo-operator.dev/e2e"
"""Label of the namespaces that the story makes. It deletes no other."""
OPERATOR = "app.kubernetes.io/name=dpo-operator,app.kubernetes.io/component=operator"
"""Selects the operator's pod and no other of the release."""
TRIAL = "trial"
"""Claim of `helm test`."""


def values(
    *, init_container: bool = True, operator: str = OPERATOR_IMAGE, trainer: str = TRAINER_IMAGE, **more: Any
) -> dict[str, Any]:
    """Return the values of an installation. To see short jobs pass, operator and Prometheus scrape a trainer often."""
    return {
        "image": _parts(operator),
        "trainer": {"image": _parts(trainer)},
        "trainingOperator": {"initContainer": {"create": init_container, "name": TEMPLATE}},
        "settings": {"scrape-seconds": 2, "progress-write-seconds": 2},
        "monitoring": {"trainer": {"interval": "1s"}},
        "test": {"storage": {"claim": TRIAL}},
        **more,
    }


def install(cluster: Cluster, given: dict[str, Any], chart: Path = CHART) -> None:
    """Install the release or upgrade it; return once the operator is ready."""
    path = cluster.layout.run / "values.yaml"
    path.write_text(yaml.safe_dump(given))
    make_namespace(cluster, NAMESPACE)
    words = ["upgrade", "--install", NAME, str(chart), "--namespace", NAMESPACE]
    cluster.helm(*words, "--values", str(path), "--wait", "--timeout=120s")


def make_namespace(cluster: Cluster, name: str, **labels: str) -> None:
    """Make a namespace that shows that it is ours."""
    metadata = {"name": name, "labels": {OURS: "story", **labels}}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(body))


def try_out(cluster: Cluster) -> str:
    """Run `helm test` and return the output of its job; its volume is a folder of the node."""
    folder = cluster.layout.run / TRIAL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    folder.chmod(0o1777)
    cluster.kubectl("-n", NAMESPACE, "delete", "pvc", TRIAL, "--ignore-not-found")
    cluster.kubectl("delete", "pv", TRIAL, "--ignore-not-found")
    base = {"accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    volume = {**base, "capacity": {"storage": "1Gi"}, "hostPath": {"path": str(folder)}}
    claim = {**base, "volumeName": TRIAL, "resources": {"requests": {"storage": "1Gi"}}}
    objects = [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": TRIAL}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": TRIAL}, "spec": claim},
    ]
    cluster.kubectl("-n", NAMESPACE, "create", "-f", "-", stdin=yaml.safe_dump_all(objects))
    cluster.helm("test", NAME, "--namespace", NAMESPACE, "--timeout=180s")
    return cluster.kubectl("-n", NAMESPACE, "logs", f"{NAME}-dpo-operator-test")


def uninstall(cluster: Cluster, *more: str) -> None:
    """Take the release away."""
    cluster.helm("uninstall", NAME, "--namespace", NAMESPACE, "--wait", *more)


def figures(cluster: Cluster) -> str:
    """Return how long the operator took until it was ready, and the memory that it uses, as one line."""
    (pod,) = cluster.api.list(("v1", "pods"), NAMESPACE, labelSelector=OPERATOR)
    began = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
    ready = next(c["lastTransitionTime"] for c in pod["status"]["conditions"] if c["type"] == "Ready")
    seconds = (datetime.fromisoformat(ready) - datetime.fromisoformat(began)).total_seconds()
    node = cluster.api.call("GET", f"/api/v1/nodes/{pod['spec']['nodeName']}/proxy/stats/summary")
    used = next(each for each in node["pods"] if each["podRef"]["uid"] == pod["metadata"]["uid"])["containers"]
    memory = sum(container["memory"]["workingSetBytes"] for container in used) / 2**20
    return f"operator: ready {seconds:.0f} s after its container's start; {memory:.0f} MiB"


def _parts(image: str) -> dict[str, str]:
    repository, _, tag = image.rpartition(":")
    return {"repository": repository, "tag": tag}
