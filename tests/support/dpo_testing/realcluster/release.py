"""The product in the cluster: our chart, installed and changed by Helm as its users do it."""

from __future__ import annotations

from typing import Any

import yaml

from dpo_testing.realcluster.cluster import OPERATOR_IMAGE, TRAINER_IMAGE, Cluster
from dpo_testing.realcluster.layout import REPOSITORY
from dpo_testing.realcluster.trainingoperator import TEMPLATE

CHART = REPOSITORY / "charts" / "dpo-operator"
NAME = "dpo"
NAMESPACE = "dpo-system"


def values(*, init_container: bool = True, **more: Any) -> dict[str, Any]:
    """Return the values of an installation; a trainer is looked at every two seconds, to see short jobs pass."""
    operator, trainer = (image.rpartition(":") for image in (OPERATOR_IMAGE, TRAINER_IMAGE))
    return {
        "image": {"repository": operator[0], "tag": operator[2]},
        "trainer": {"image": {"repository": trainer[0], "tag": trainer[2]}},
        "trainingOperator": {"initContainer": {"create": init_container, "name": TEMPLATE}},
        "settings": {"scrape-seconds": 2, "progress-write-seconds": 2},
        **more,
    }


def install(cluster: Cluster, given: dict[str, Any]) -> None:
    """Install the release or upgrade it; return once the operator is ready."""
    path = cluster.layout.run / "values.yaml"
    path.write_text(yaml.safe_dump(given))
    words = ["upgrade", "--install", NAME, str(CHART), "--namespace", NAMESPACE, "--create-namespace"]
    cluster.helm(*words, "--values", str(path), "--wait", "--timeout=120s")


def uninstall(cluster: Cluster) -> None:
    """Take the release away."""
    cluster.helm("uninstall", NAME, "--namespace", NAMESPACE, "--wait")
