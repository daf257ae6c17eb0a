"""Prometheus over the real cluster: it finds trainers and operator as prometheus-operator would let it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dpo_monitoring.alerts import rules
from dpo_testing.prometheusserver import Config, scrape_config
from dpo_testing.realcluster.cluster import Cluster
from dpo_testing.realcluster.release import NAME, NAMESPACE
from dpo_testing.s3server import module_of

_KINDS = ("podmonitors", "servicemonitors", "prometheusrules")


def install_kinds(cluster: Cluster) -> None:
    """Install prometheus-operator's kinds, out of its own module: then the chart makes its monitors by itself."""
    source = module_of("github.com/prometheus-operator/prometheus-operator")
    folder = source / "example" / "prometheus-operator-crd"
    files = [f"--filename={folder}/monitoring.coreos.com_{kind}.yaml" for kind in _KINDS]
    cluster.kubectl("apply", "--server-side", *files)
    names = [f"crd/{kind}.monitoring.coreos.com" for kind in _KINDS]
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", *names)


def config(cluster: Cluster, folder: Path) -> Config:
    """Return Prometheus' configuration for the monitors of the installed release, with the alerts it came with.

    A test cannot wait half an hour: the alerts' `for` is five seconds here; their expressions are unchanged.
    """
    manifest = cluster.helm("get", "manifest", NAME, "--namespace", NAMESPACE)
    objects: list[dict[str, Any]] = [each for each in yaml.safe_load_all(manifest) if each]
    found = scrape_config(objects, kubeconfig=cluster.layout.admin)
    quick = rules()
    (installed,) = [each["spec"] for each in objects if each["kind"] == "PrometheusRule"]
    assert installed == quick, "the release's rules are not the generated ones"
    for rule in quick["groups"][0]["rules"]:
        rule["for"] = "5s"
    path = folder / "alerts.yaml"
    path.write_text(yaml.safe_dump(quick))
    return {**found, "rule_files": [str(path)]}
