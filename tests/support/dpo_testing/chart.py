"""The chart as Helm renders it, with values and a cluster's kinds of one's choice."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo_testing.kubeapi import Object
from dpo_testing.s3server import tool

REPOSITORY = Path(__file__).resolve().parents[3]
CHART = REPOSITORY / "charts" / "dpo-operator"
RELEASE, NAMESPACE = "dpo-operator", "dpo-system"
MONITORING = tuple(f"monitoring.coreos.com/v1/{kind}" for kind in ("PodMonitor", "ServiceMonitor", "PrometheusRule"))

COMBINATIONS: dict[str, Mapping[str, Any]] = {
    "defaults": {},
    "some namespaces": {"watchNamespaces": ["team-a", "team-b"], "rbac": {"aggregate": False}},
    "everything": {
        "nameOverride": "dpo",
        "commonLabels": {"team": "ml"},
        "image": {"digest": "sha256:" + 64 * "0"},
        "imagePullSecrets": [{"name": "pull"}],
        "trainer": {
            "env": {"NCCL_DEBUG": "INFO", "NCCL_IB_TIMEOUT": 22},
            "labels": {"linkerd.io/inject": "disabled"},
            "imagePullSecrets": [{"name": "pull-trainer"}, {"name": "pull-more"}],
            "annotations": {"karpenter.sh/do-not-disrupt": "true", "note": 'a="b", c=d'},
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "tolerationSeconds": 300}],
            "podPatch": {"spec": {"tolerations": [{"operator": "Exists"}]}},
            "runtimeClassName": "nvidia",
            "priorityClassName": "low",
        },
        "defaults": {
            "s3": {"endpoint": "https://s3.example.com", "region": "eu-1"},
            "queue": "all",
            "ttlSecondsAfterFinished": 3600,
        },
        "settings": {"workers": 64, "scrape-seconds": 1.5, "scrape-by": "pod-ip"},
        "log": {"format": "text", "level": "debug"},
        "podAnnotations": {"linkerd.io/inject": "disabled"},
        "nodeSelector": {"role": "infra"},
        "affinity": {"podAntiAffinity": {}},
        "tolerations": [{"key": "infra", "operator": "Exists"}],
        "runAsUser": 1000650000,
        "priorityClass": {"create": True},
        "podDisruptionBudget": {"enabled": True},
        "serviceAccount": {"annotations": {"example.com/role": "x"}},
        "networkPolicy": {
            "operator": {"enabled": True, "from": [{"namespaceSelector": {}}]},
            "trainer": {"metricsFrom": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "prom"}}}]},
        },
        "admissionPolicy": {"enabled": "always"},
        "metrics": {"tls": {"secretName": "tls"}, "authentication": {"enabled": True}},
        "monitoring": {
            "enabled": "always",
            "labels": {"release": "kps"},
            "rules": {"alerts": {"DPOJobFailed": {"enabled": False}, "DPOCheckpointTooOld": {"hours": 4}}},
        },
        "dashboards": {"annotations": {"grafana_folder": "DPO"}, "namespace": "monitoring"},
        "trainingOperator": {"initContainer": {"create": True}},
        "test": {"storage": {"storageClass": "fast"}, "spec": {"podTemplate": {"nodeSelector": {"a": "b"}}}},
    },
    "little": {
        "serviceAccount": {"create": False, "name": "given"},
        "rbac": {"create": False, "aggregate": False},
        "crds": {"install": False},
        "service": {"enabled": False},
        "dashboards": {"enabled": False},
        "monitoring": {"enabled": "never"},
        "test": {"fsGroup": None, "namespace": "team-b", "storage": {"claim": "mine"}},
    },
    "jobs are lost with the release": {"crds": {"keep": False}, "monitoring": {"rules": {"enabled": False}}},
}
"""Values that differ in what is made, by what they are called in tests."""


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class HelmError(Exception):
    """Helm refused; the text is its own."""


def helm(*arguments: str, home: Path, stdin: str | None = None) -> str:
    """Run Helm with a home folder of its own; return its output. Raises HelmError, ToolMissingError without Go."""
    done = subprocess.run(
        [str(tool("helm")), *arguments],
        input=stdin, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise HelmError(done.stderr)
    return done.stdout


def render(
    values: Mapping[str, Any] | None = None,
    *,
    home: Path,
    apis: Iterable[str] = MONITORING,
    chart: Path = CHART,
    namespace: str = NAMESPACE,
) -> list[Object]:
    """Return every object of a release, those of `helm test` included. ``apis``: kinds that the cluster has."""
    known = [f"--api-versions={api}" for api in apis]
    words = ["template", RELEASE, str(chart), "--namespace", namespace, "--values=-", *known]
    text = _template(tuple(words), yaml.safe_dump(dict(values or {})), home)
    return [document for document in yaml.load_all(text, _LOADER) if document]


@functools.cache  # Helm takes half a second
def _template(words: tuple[str, ...], values: str, home: Path) -> str:
    return helm(*words, home=home, stdin=values)


def pick(objects: Iterable[Object], kind: str, ending: str = "") -> Object:
    """Return the one object of a kind whose name has an ending."""
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, [o["metadata"]["name"] for o in found]
    return found[0]


def is_test(thing: Object) -> bool:
    """Tell whether an object belongs to `helm test` alone."""
    return (thing["metadata"].get("annotations") or {}).get("helm.sh/hook") == "test"


def environment(deployment: Object) -> dict[str, str]:
    """Return the variables of the operator's container."""
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}
