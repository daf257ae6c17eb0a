"""A real Kubernetes control plane on loopback: etcd, API server, controller-manager and training-operator.

There is no kubelet and no scheduler: ``fakekubelet`` plays both. Everything lives in one temporary folder and on free
ports, and is gone after ``stop``. The programs are Go tools of hack/tools, or those of KUBEBUILDER_ASSETS.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_testing.kubeapi import PYTORCHJOBS, Api, ApiError, Object, eventually
from dpo_testing.pki import Authority, Pair, service_account_keys
from dpo_testing.s3server import module_of, tool

REPOSITORY = Path(__file__).resolve().parents[3]
_CRDS = ("apiextensions.k8s.io/v1", "customresourcedefinitions")
_NAMESPACES = ("v1", "namespaces")

INIT_CONTAINER = """\
- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
  command: ['sh', '-c', 'until nslookup {{.MasterAddr}}; do sleep 1; done']
"""
"""The init container that PyTorchJob puts into workers, in a form that the restricted Pod Security level admits."""

_CONTROLLERS = (
    "garbage-collector-controller",
    "namespace-controller",
    "persistentvolumeclaim-protection-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
)
_NODE_CONTROLLERS = (
    "pod-garbage-collector-controller",
    "node-lifecycle-controller",
    "taint-eviction-controller",
)


class ControlPlane:
    """One cluster without a kubelet. ``admin`` talks to it with every right."""

    def __init__(self, *, nodes: bool = True, frugal: bool = True) -> None:
        """Make folders, certificates and choose ports; ``start`` runs the programs.

        ``nodes``: whether the controllers run that take pods from nodes that are lost or were never there.
        ``frugal``: save CPU, in ways that a measurement of the API server must not.
        """
        self._frugal = frugal
        self._controllers = (*_CONTROLLERS, *_NODE_CONTROLLERS) if nodes else _CONTROLLERS
        self.folder = Path(tempfile.mkdtemp(prefix="dpo-cluster-"))
        self._pki = self.folder / "pki"
        self._pki.mkdir()
        self._ca = Authority("dpo-test-ca")
        self.ca_file, _ = self._ca.pair.write(self._pki, "ca")
        self._ca.server(
            "kube-apiserver", ["127.0.0.1", "localhost", "kubernetes", "kubernetes.default.svc", "10.96.0.1"]
        ).write(self._pki, "apiserver")
        self._sa_key, self._sa_pub = service_account_keys(self._pki)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.etcd_port, self._port = stable_port(), stable_port()
        self.url = f"https://127.0.0.1:{self._port}"
        self.kubeconfig = self.identity("admin", ["system:masters"])
        certificate, key = self._ca.client("admin", ["system:masters"]).write(self._pki, "admin")
        self.admin = Api(self.url, str(self.ca_file), str(certificate), str(key))

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, *, training_operator: bool = True) -> None:
        """Start everything and return once it serves. About 10 s."""
        self._run("etcd", self._etcd_arguments())
        self._start_apiserver()
        self.install_crd(REPOSITORY / "crds" / "dpojobs.yaml")
        if training_operator:
            self.install_crd(pytorchjob_crd())
        # The garbage collector looks for new kinds every 30 s only: let it find ours at once.
        self._run("kube-controller-manager", self._controller_manager_arguments())
        if training_operator:
            self._start_training_operator()

    def stop(self) -> None:
        """End every program and remove the folder."""
        for name in reversed(list(self._processes)):
            # Nothing here is worth keeping: SIGTERM would cost the API server seconds.
            self._end(name, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def restart_apiserver(self) -> None:
        """Kill the API server and restart it on its port, as an upgrade of a control plane does."""
        self._end("kube-apiserver", signal.SIGKILL)
        self._start_apiserver()

    def pid(self, name: str) -> int:
        """Return the process id of a program that runs."""
        return self._processes[name].pid

    def end(self, name: str) -> None:
        """End one program for good."""
        self._end(name, signal.SIGKILL)

    def log(self, name: str) -> str:
        """Return what a program has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _run(self, name: str, arguments: list[str], env: Mapping[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(tool(name)), *arguments],
                stdout=log,
                stderr=log,
                # Memory is cheaper here than the CPU that garbage collection takes.
                env={
                    **os.environ,
                    "NO_PROXY": "127.0.0.1,localhost",
                    **({"GOGC": "300"} if self._frugal else {}),
                    **(env or {}),
                },
                cwd=self.folder,
                # Test processes come and go by SIGINT too; these end by our own hand only.
                start_new_session=True,
            )

    def _end(self, name: str, sign: signal.Signals) -> None:
        process = self._processes.pop(name)
        process.send_signal(sign)
        process.wait(30)

    def _alive(self, name: str) -> None:
        if self._processes[name].poll() is not None:
            raise RuntimeError(f"{name} ended with {self._processes[name].returncode}:\n{self.log(name)[-4000:]}")

    def _etcd_arguments(self) -> list[str]:
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{stable_port()}"
        return [
            "--name=t", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", "--log-level=error",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=t={peer}",
        ]  # fmt: skip

    def _start_apiserver(self) -> None:
        p = self._pki
        arguments = [
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}", "--bind-address=127.0.0.1",
            f"--secure-port={self._port}", "--endpoint-reconciler-type=none",
            f"--tls-cert-file={p}/apiserver.crt", f"--tls-private-key-file={p}/apiserver.key",
            f"--client-ca-file={p}/ca.crt", f"--service-account-key-file={self._sa_pub}",
            f"--service-account-signing-key-file={self._sa_key}",
            "--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
            # Watch caches of a hundred kinds that no test uses cost memory and seconds.
            "--default-watch-cache-size=50", "--profiling=false",
            # An idle API server takes a third less without it. The tests' clients are exempt from it as administrators.
            *(["--enable-priority-and-fairness=false"] if self._frugal else []),
            # Host clocks of test machines jump; leases of the API server itself do not matter here.
            "--anonymous-auth=false",
        ]  # fmt: skip
        self._run("kube-apiserver", arguments)
        self._wait_ready("kube-apiserver", lambda: self.admin.call("GET", "/readyz", timeout=2.0) == "ok")

    def _controller_manager_arguments(self) -> list[str]:
        kubeconfig = self.identity("system:kube-controller-manager", ["system:masters"])
        return [
            f"--kubeconfig={kubeconfig}", "--bind-address=127.0.0.1", f"--secure-port={stable_port()}",
            f"--service-account-private-key-file={self._sa_key}", f"--root-ca-file={self._pki}/ca.crt",
            "--leader-elect=false", "--authentication-skip-lookup", "--controllers=" + ",".join(self._controllers),
            # A node is lost some seconds after its lease stops; pods leave it as soon as their toleration ends. With
            # fewer seconds a busy machine makes all leases late, and then the controller evicts nothing.
            "--node-monitor-period=1s", "--node-monitor-grace-period=20s", "--node-startup-grace-period=30s",
            "--node-eviction-rate=100", "--secondary-node-eviction-rate=100",
            "--kube-api-qps=200", "--kube-api-burst=400",
        ]  # fmt: skip

    def _wait_ready(self, name: str, ready: Any, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self._alive(name)
            try:
                if ready():
                    return
            except (ApiError, OSError, Exception) as error:  # noqa: BLE001 - any failure means: not yet
                last: object = error
            else:
                last = "not ready"
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} is not ready after {seconds:.0f} s ({last}):\n{self.log(name)[-4000:]}")
            time.sleep(0.05)

    # -- training-operator ------------------------------------------------------------------------------------------

    def _start_training_operator(self) -> None:
        health, port = stable_port(), stable_port()
        certificates = self._webhook_certificates(port)
        template = self.folder / "init-container.yaml"
        template.write_text(INIT_CONTAINER)
        self._run(
            "training-operator",
            [
                "--enable-scheme=pytorchjob", f"--metrics-bind-address=127.0.0.1:{stable_port()}",
                f"--health-probe-bind-address=127.0.0.1:{health}", f"--webhook-server-port={port}",
                "--pytorch-init-container-image=localhost/busybox:1",
                f"--pytorch-init-container-template-file={template}",
                "--controller-threads=4", "--kube-api-qps=200", "--kube-api-burst=400",
            ],
            # The webhook server looks for its certificate under the temporary folder.
            {"KUBECONFIG": str(self.kubeconfig), "TMPDIR": str(certificates)},
        )  # fmt: skip

        def ready() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{health}/readyz", timeout=2.0) as answer:
                return bool(answer.read() == b"ok")

        self._wait_ready("training-operator", ready)

        def admits() -> bool:
            # The webhook's CA reaches the API server a moment after /readyz.
            try:
                self.admin.call("POST", "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs", _PROBE, dryRun="All")
            except ApiError as error:
                return "failed calling webhook" not in error.message
            return True

        self._wait_ready("training-operator", admits)

    def _webhook_certificates(self, port: int) -> Path:
        authority = Authority("training-operator-ca", use_rsa=True, alternative_names=["training-operator-ca"])
        serving = authority.server("training-operator", ["training-operator.kubeflow.svc", "127.0.0.1"])
        temporary = self.folder / "training-operator"
        folder = temporary / "k8s-webhook-server" / "serving-certs"
        folder.mkdir(parents=True)
        _write_pair(folder, serving)
        # The rotator only looks whether these two files are there, at a path that no flag moves.
        fixed = Path("/tmp/k8s-webhook-server/serving-certs")
        fixed.mkdir(parents=True, exist_ok=True)
        if not (fixed / "tls.key").exists():
            _write_pair(fixed, serving)
        self.admin.create(_NAMESPACES, None, {"metadata": {"name": "kubeflow"}})
        data = {
            "ca.crt": authority.pair.certificate, "ca.key": authority.pair.key,
            "tls.crt": serving.certificate, "tls.key": serving.key,
        }  # fmt: skip
        secret = {
            "metadata": {"name": "training-operator-webhook-cert"},
            "data": {name: base64.b64encode(value).decode() for name, value in data.items()},
        }
        self.admin.create(("v1", "secrets"), "kubeflow", secret)
        webhook = {
            "metadata": {"name": "validator.training-operator.kubeflow.org"},
            "webhooks": [
                {
                    "name": "validator.pytorchjob.training-operator.kubeflow.org",
                    "admissionReviewVersions": ["v1"],
                    "clientConfig": {"url": f"https://127.0.0.1:{port}/validate-kubeflow-org-v1-pytorchjob"},
                    "failurePolicy": "Fail",
                    "sideEffects": "None",
                    "rules": [
                        {
                            "apiGroups": ["kubeflow.org"],
                            "apiVersions": ["v1"],
                            "operations": ["CREATE", "UPDATE"],
                            "resources": ["pytorchjobs"],
                        }
                    ],
                }
            ],
        }
        self.admin.create(("admissionregistration.k8s.io/v1", "validatingwebhookconfigurations"), None, webhook)
        return temporary

    # -- use ----------------------------------------------------------------------------------------------------------

    def install_crd(self, manifest: Path) -> None:
        """Apply a CustomResourceDefinition and wait until its kind is served."""
        # kubectl reads YAML; the API server takes it too, under server-side apply.
        text = manifest.read_text()
        name = _crd_name(text)
        request = urllib.request.Request(
            f"{self.url}/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}?fieldManager=tests&force=true",
            data=text.encode(),
            method="PATCH",
            headers={"Content-Type": "application/apply-patch+yaml"},
        )
        with urllib.request.urlopen(request, timeout=30.0, context=self.tls()):
            pass

        def established() -> bool:
            conditions = self.admin.get(_CRDS, None, name).get("status", {}).get("conditions") or []
            return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

        eventually(established, what=f"the CRD {name} is established")

    def tls(self) -> ssl.SSLContext:
        """Return the API server's CA and the admin's certificate, for other clients."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.load_cert_chain(self._pki / "admin.crt", self._pki / "admin.key")
        return context

    def api(self, user: str, groups: list[str]) -> Api:
        """Return a client that acts as a user of these groups."""
        certificate, key = self._ca.client(user, groups).write(self._pki, f"{user}-{uuid.uuid4().hex[:6]}")
        return Api(self.url, str(self.ca_file), str(certificate), str(key))

    def identity(self, user: str, groups: list[str] | None = None, *, server: str | None = None) -> Path:
        """Return a kubeconfig for a user of these groups, at ``server`` (a proxy) or the API server itself."""
        name = f"{user.replace(':', '-')}-{uuid.uuid4().hex[:6]}"
        certificate, key = self._ca.client(user, groups or []).write(self._pki, name)
        path = self._pki / f"{name}.kubeconfig"
        path.write_text(kubeconfig(server or self.url, self.ca_file, certificate, key))
        return path

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as admin."""
        done = subprocess.run(
            [str(tool("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin, capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, "HOME": str(self.folder), "NO_PROXY": "127.0.0.1"},
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)} → {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    @contextlib.contextmanager
    def namespace(self, prefix: str = "t", labels: Mapping[str, str] | None = None) -> Iterator[str]:
        """Make a namespace with its default service account; it is deleted, without waiting, at the end."""
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.admin.create(_NAMESPACES, None, {"metadata": {"name": name, "labels": dict(labels or {})}})
        # Pods are refused until the service-account controller has been here.
        eventually(lambda: self.admin.find(("v1", "serviceaccounts"), name, "default"), what="a default ServiceAccount")
        try:
            yield name
        finally:
            with contextlib.suppress(ApiError):
                self.admin.delete(_NAMESPACES, None, name)


def stable_port() -> int:
    """Return a free loopback port that the kernel gives to no outgoing connection, so that a restart finds it free."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    for _ in range(100):
        port = random.randrange(min(20_000, first_ephemeral - 2_000), first_ephemeral)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port below the ephemeral ones")


def kubeconfig(server: str, ca: Path, certificate: Path, key: Path) -> str:
    """Return a kubeconfig (JSON is YAML) of one context."""
    cluster: Object = {"server": server}
    if server.startswith("https"):
        cluster["certificate-authority"] = str(ca)
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {"client-certificate": str(certificate), "client-key": str(key)}}],
    }  # fmt: skip
    return json.dumps(config)


def pytorchjob_crd() -> Path:
    """Return the CRD's manifest out of training-operator's own module, of the version that hack/tools pins."""
    source = module_of("github.com/kubeflow/training-operator")
    return source / "manifests" / "base" / "crds" / "kubeflow.org_pytorchjobs.yaml"


def _crd_name(text: str) -> str:
    """Return metadata.name of a manifest of which parsing 644 KB for one line would take seconds."""
    for line in text.splitlines():
        if line.startswith("  name: "):
            return line.removeprefix("  name: ").strip()
    raise ValueError("the manifest has no metadata.name")


def _write_pair(folder: Path, pair: Pair) -> None:
    (folder / "tls.crt").write_bytes(pair.certificate)
    (folder / "tls.key").write_bytes(pair.key)


_CONTAINER = {"name": "pytorch", "image": "localhost/probe:1"}
_PROBE: Object = {
    "apiVersion": PYTORCHJOBS[0],
    "kind": "PyTorchJob",
    "metadata": {"name": "probe"},
    "spec": {"pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": {"spec": {"containers": [_CONTAINER]}}}}},
}
