"""A real Prometheus: configured of the chart's monitors by prometheus-operator's own generator, and asked questions."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from dpo_testing.controlplane import stable_port
from dpo_testing.kubeapi import eventually
from dpo_testing.s3server import tool

CHART = Path(__file__).resolve().parents[3] / "charts" / "dpo-operator"
RELEASE_NAMESPACE = "dpo-system"
_KINDS = ("PodMonitor", "ServiceMonitor", "PrometheusRule")

Config = dict[str, Any]


class PrometheusServer:
    """Prometheus on a loopback port, with storage of its own. A context manager."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Prepare; ``config`` is the configuration file."""
        self._home = tempfile.TemporaryDirectory(prefix="prometheus-", ignore_cleanup_errors=True)
        self.folder = Path(self._home.name)
        self.port = stable_port()
        self._process: subprocess.Popen[bytes] | None = None
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(dict(config), sort_keys=False))

    def __enter__(self) -> Self:
        """Start it and wait until it answers. Raises ToolMissingError without Go."""
        command = [
            str(tool("prometheus")), f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]  # fmt: skip
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        eventually(self._ready, seconds=60, what="Prometheus is ready")
        return self

    def __exit__(self, *_: object) -> None:
        """End it and remove what it stored."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20)
        self._home.cleanup()

    def _ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"Prometheus ended:\n{self.log()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def log(self) -> str:
        """Return what it has logged: warnings and errors."""
        return (self.folder / "log").read_text(errors="replace")

    def get(self, path: str, **query: str) -> Any:
        """Return the data of one API request. Raises AssertionError with Prometheus' own words for a refusal."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query or path}: {error.read().decode()}") from error

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the series that an expression gives now: ``metric`` (labels) and ``value`` (time, text)."""
        result: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return result

    def firing(self) -> dict[str, list[dict[str, str]]]:
        """Return the labels of all alerts that fire, by the alert's name."""
        found: dict[str, list[dict[str, str]]] = {}
        for alert in self.get("alerts")["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return found


def rendered(*values: str, release: str = "dpo") -> list[dict[str, Any]]:
    """Return the chart's objects, rendered by Helm for a cluster with prometheus-operator. ``values``: ``a.b=c``."""
    command = [str(tool("helm")), "template", release, str(CHART), f"--namespace={RELEASE_NAMESPACE}"]
    command += [f"--api-versions=monitoring.coreos.com/v1/{kind}" for kind in _KINDS]
    command += [f"--set={value}" for value in values]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def scrape_config(objects: Iterable[Mapping[str, Any]], *, kubeconfig: Path, interval: str = "1s") -> Config:
    """Return Prometheus' configuration for the monitors among the objects, with discovery through a kubeconfig."""
    done = subprocess.run(
        [str(tool("scrape-config")), f"-namespace={RELEASE_NAMESPACE}", f"-interval={interval}"],
        input=yaml.safe_dump_all(dict(item) for item in objects),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    config: Config = yaml.safe_load(done.stdout)
    for job in config["scrape_configs"]:
        for discovery in job.get("kubernetes_sd_configs", ()):
            discovery["kubeconfig_file"] = str(kubeconfig)
    return config


def pin_operator(config: Config, objects: Iterable[Mapping[str, Any]], address: str) -> None:
    """Let the ServiceMonitor's job find an operator that is a process of this machine, not a pod behind a Service.

    Its target carries the labels that discovery would give it, so the job's relabelling is tried as it is. (An API
    server takes no loopback address into Endpoints.)
    """
    service = next(item for item in objects if item["kind"] == "Service")
    name = service["metadata"]["name"]
    labels = {
        "__meta_kubernetes_namespace": RELEASE_NAMESPACE,
        "__meta_kubernetes_service_name": name,
        "__meta_kubernetes_endpoint_port_name": service["spec"]["ports"][0]["name"],
        "__meta_kubernetes_endpoint_address_target_kind": "Pod",
        "__meta_kubernetes_endpoint_address_target_name": f"{name}-0",
        "__meta_kubernetes_pod_name": f"{name}-0",
        "__meta_kubernetes_pod_container_name": "operator",
        "__meta_kubernetes_pod_phase": "Running",
    }
    for label, value in service["metadata"]["labels"].items():
        plain = re.sub(r"[^a-zA-Z0-9_]", "_", label)
        labels[f"__meta_kubernetes_service_label_{plain}"] = value
        labels[f"__meta_kubernetes_service_labelpresent_{plain}"] = "true"
    (job,) = [job for job in config["scrape_configs"] if job["job_name"].startswith("serviceMonitor/")]
    del job["kubernetes_sd_configs"]
    job["static_configs"] = [{"targets": [address], "labels": labels}]
