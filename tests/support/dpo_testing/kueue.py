"""The real Kueue beside a control plane of ``controlplane``: queues with a quota of GPUs, and their workloads.

Kueue runs as a process of this machine with its own webhooks for PyTorchJobs, workloads and queues; those for other
kinds of job are left out, and the topology, multi-cluster and visibility features are off. Its certificates are ours:
its rotator finds them valid and leaves them alone.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import yaml

from dpo_testing.controlplane import ControlPlane, stable_port
from dpo_testing.kubeapi import PYTORCHJOBS, Api, ApiError, Object, eventually
from dpo_testing.pki import Authority
from dpo_testing.s3server import module_of, tool

MANAGED = "dpo-testing/kueue"
"""Label of the namespaces that Kueue looks after."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
GPU = "nvidia.com/gpu"

_VERSION = "kueue.x-k8s.io/v1beta1"
_WORKLOADS = (_VERSION, "workloads")
_SYSTEM = "kueue-system"
_ADMISSION = "admissionregistration.k8s.io/v1"
_CONFIGURATIONS = {"Mutating": "mutatingwebhookconfigurations", "Validating": "validatingwebhookconfigurations"}
_WEBHOOKS = ("pytorchjob", "workload", "clusterqueue", "resourceflavor", "cohort")
_FEATURES_OFF = ("VisibilityOnDemand", "MultiKueue", "TopologyAwareScheduling")


class Kueue:
    """A context manager. It manages the namespaces that carry the label ``MANAGED``."""

    def __init__(self, cluster: ControlPlane) -> None:
        """Prepare; nothing runs before ``with``."""
        self._cluster = cluster
        self._folder = cluster.folder / "kueue"
        self._process: subprocess.Popen[bytes] | None = None
        self._health, self._port = stable_port(), stable_port()

    def __enter__(self) -> Self:
        """Install Kueue's kinds and webhooks, start it, and return once it suspends a PyTorchJob of a queue."""
        self._folder.mkdir()
        config = module_of("sigs.k8s.io/kueue") / "config" / "components"
        with ThreadPoolExecutor(4) as pool:  # each takes a while to be served
            list(pool.map(self._cluster.install_crd, sorted((config / "crd" / "bases").glob("*.yaml"))))
        self._apply(("v1", "namespaces"), "Namespace", {"metadata": {"name": _SYSTEM}})
        self._install_webhooks(config / "webhook" / "manifests.yaml", self._certificates())
        log = self._folder / "kueue.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(tool("kueue")), f"--config={self._configuration()}"],
                stdout=output,
                stderr=output,
                env={**os.environ, "KUBECONFIG": str(self._cluster.kubeconfig), "NO_PROXY": "127.0.0.1,localhost"},
                cwd=self._folder,
                start_new_session=True,
            )
        try:
            eventually(self._ready, seconds=90, what="Kueue is ready")
            with self._cluster.namespace("kueue-probe", {MANAGED: "true"}) as probe:
                eventually(lambda: self._suspends(probe), seconds=60, what="Kueue suspends a new PyTorchJob")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it. Its webhooks go first: nobody would answer them."""
        for plural in _CONFIGURATIONS.values():
            name = f"kueue-{plural.removesuffix('webhookconfigurations')}-webhook-configuration"
            self._cluster.admin.delete((_ADMISSION, plural), None, name)
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)

    # -- installation -------------------------------------------------------------------------------------------------

    def _apply(self, resource: tuple[str, str], kind: str, body: Object, namespace: str | None = None) -> None:
        self._cluster.admin.apply(resource, namespace, {"apiVersion": resource[0], "kind": kind, **body})

    def _configuration(self) -> Path:
        path = self._folder / "config.json"
        configuration = {
            "apiVersion": "config.kueue.x-k8s.io/v1beta1",
            "kind": "Configuration",
            "namespace": _SYSTEM,
            "health": {"healthProbeBindAddress": f"127.0.0.1:{self._health}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"host": "127.0.0.1", "port": self._port, "certDir": str(self._folder)},
            "leaderElection": {"leaderElect": False},
            "clientConnection": {"qps": 200, "burst": 400},
            # Switched off, Kueue insists on a certificate for its metrics at a fixed path under /etc.
            "internalCertManagement": {"enable": True},
            "managedJobsNamespaceSelector": {"matchLabels": {MANAGED: "true"}},
            "integrations": {"frameworks": ["kubeflow.org/pytorchjob"]},
            "featureGates": dict.fromkeys(_FEATURES_OFF, False) | {"ManagedJobsNamespaceSelectorAlwaysRespected": True},
        }
        path.write_text(json.dumps(configuration))
        return path

    def _certificates(self) -> bytes:
        """Write Kueue's serving certificate to its folder and into its Secret; return the CA's certificate."""
        authority = Authority("kueue-ca", use_rsa=True, alternative_names=["kueue-ca"])
        serving = authority.server("kueue", [f"kueue-webhook-service.{_SYSTEM}.svc", "127.0.0.1"])
        serving.write(self._folder, "tls")
        data = {
            "ca.crt": authority.pair.certificate, "ca.key": authority.pair.key,
            "tls.crt": serving.certificate, "tls.key": serving.key,
        }  # fmt: skip
        encoded = {name: base64.b64encode(value).decode() for name, value in data.items()}
        secret = {"metadata": {"name": "kueue-webhook-server-cert"}, "data": encoded}
        self._apply(("v1", "secrets"), "Secret", secret, _SYSTEM)
        return authority.pair.certificate

    def _install_webhooks(self, manifests: Path, authority: bytes) -> None:
        """Apply Kueue's own webhook configurations, with the service replaced by this machine."""
        for document in yaml.safe_load_all(manifests.read_text()):
            form = document["kind"].removesuffix("WebhookConfiguration")
            webhooks = [hook for hook in document["webhooks"] if hook["name"][1:].removesuffix(".kb.io") in _WEBHOOKS]
            for hook in webhooks:
                hook["clientConfig"] = {
                    "url": f"https://127.0.0.1:{self._port}{hook['clientConfig']['service']['path']}",
                    "caBundle": base64.b64encode(authority).decode(),
                }
                if "pytorchjob" in hook["name"]:  # other tests share the control plane
                    hook["namespaceSelector"] = {"matchLabels": {MANAGED: "true"}}
            name = f"kueue-{form.lower()}-webhook-configuration"
            self._apply(
                (_ADMISSION, _CONFIGURATIONS[form]),
                document["kind"],
                {"metadata": {"name": name}, "webhooks": webhooks},
            )

    def _ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"Kueue ended with {self._process.returncode}:\n{self.log()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health}/readyz", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _suspends(self, namespace: str) -> bool:
        template = {"spec": {"containers": [{"name": "pytorch", "image": "localhost/probe:1"}]}}
        body = {
            "metadata": {"name": "probe", "labels": {QUEUE_LABEL: "none"}},
            "apiVersion": PYTORCHJOBS[0], "kind": "PyTorchJob",
            "spec": {"pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}}},
        }  # fmt: skip
        path = f"/apis/{PYTORCHJOBS[0]}/namespaces/{namespace}/pytorchjobs"
        try:
            made = self._cluster.admin.call("POST", path, body, dryRun="All")
        except ApiError as error:
            if "failed calling webhook" in error.message:
                return False
            raise
        return bool(made["spec"].get("runPolicy", {}).get("suspend"))

    def log(self) -> str:
        """Return what Kueue has written."""
        return (self._folder / "kueue.log").read_text(errors="replace")

    # -- queues -------------------------------------------------------------------------------------------------------

    def priority(self, name: str, value: int) -> None:
        """Make a WorkloadPriorityClass."""
        resource = (_VERSION, "workloadpriorityclasses")
        self._apply(resource, "WorkloadPriorityClass", {"metadata": {"name": name}, "value": value})

    def queue(self, namespace: str, *, gpus: int, preempt: bool = False) -> Queue:
        """Make a LocalQueue of a namespace and the ClusterQueue behind it, which admits up to ``gpus`` GPUs.

        ``preempt``: workloads of a higher priority take the place of admitted ones of a lower.
        """
        self._apply((_VERSION, "resourceflavors"), "ResourceFlavor", {"metadata": {"name": "any"}})
        name = f"q-{uuid.uuid4().hex[:6]}"
        flavor = {"name": "any", "resources": [{"name": GPU, "nominalQuota": gpus}]}
        spec = {
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority" if preempt else "Never"},
            "resourceGroups": [{"coveredResources": [GPU], "flavors": [flavor]}],
        }
        self._apply((_VERSION, "clusterqueues"), "ClusterQueue", {"metadata": {"name": name}, "spec": spec})
        local = {"metadata": {"name": name}, "spec": {"clusterQueue": name}}
        self._apply((_VERSION, "localqueues"), "LocalQueue", local, namespace)
        return Queue(self._cluster.admin, namespace, name)


class Queue:
    """One LocalQueue."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        """Prepare."""
        self._api = api
        self._namespace = namespace
        self.name = name

    def workload(self, child: str) -> Object:
        """Return the Workload that Kueue made of a PyTorchJob; empty where there is none."""
        for workload in self._api.list(_WORKLOADS, self._namespace):
            owners = workload["metadata"].get("ownerReferences") or []
            if any(owner["kind"] == "PyTorchJob" and owner["name"] == child for owner in owners):
                return workload
        return {}

    def conditions(self, child: str) -> dict[str, Any]:
        """Return the Workload's conditions that are True, by type."""
        found = (self.workload(child).get("status") or {}).get("conditions") or []
        return {c["type"]: c for c in found if c["status"] == "True"}
