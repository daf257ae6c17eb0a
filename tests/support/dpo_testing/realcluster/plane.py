"""The control plane: etcd, API server, controller manager, scheduler, each with the rights of a real cluster's."""

from __future__ import annotations

from dpo_testing.kubeapi import Api
from dpo_testing.realcluster import daemons
from dpo_testing.realcluster.layout import API_SERVER, GATEWAY, SERVICE_RANGE, Layout
from dpo_testing.s3server import tool

NAMES = ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")
"""In the order in which they are stopped."""


def admin(layout: Layout) -> Api:
    """Return a client with every right."""
    p = layout.pki
    return Api(API_SERVER, str(p / "ca.crt"), str(p / "admin.crt"), str(p / "admin.key"))


def start(layout: Layout) -> None:
    """Start what does not run; return once the API server answers."""
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    daemons.start(layout, "etcd", [
        tool("etcd"), "--name=e2e", f"--data-dir={layout.run}/etcd", "--unsafe-no-fsync", "--log-level=error",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=e2e={peer}",
    ])  # fmt: skip
    daemons.start(layout, "kube-apiserver", [tool("kube-apiserver"), *_api_server_flags(layout, client)])
    api = admin(layout)
    daemons.wait_until(layout, "kube-apiserver", lambda: api.call("GET", "/readyz", timeout=2.0) == "ok")
    p = layout.pki
    daemons.start(layout, "kube-controller-manager", [
        tool("kube-controller-manager"), f"--kubeconfig={layout.kubeconfig('kube-controller-manager')}",
        "--bind-address=127.0.0.1", "--use-service-account-credentials", "--leader-elect=false",
        f"--service-account-private-key-file={p}/sa.key", f"--root-ca-file={p}/ca.crt",
        f"--cluster-signing-cert-file={p}/ca.crt", f"--cluster-signing-key-file={p}/ca.key",
        "--controllers=*,-nodeipam", "--authentication-skip-lookup",
    ])  # fmt: skip
    daemons.start(layout, "kube-scheduler", [
        tool("kube-scheduler"), f"--kubeconfig={layout.kubeconfig('kube-scheduler')}",
        "--bind-address=127.0.0.1", "--leader-elect=false",
    ])  # fmt: skip


def _api_server_flags(layout: Layout, etcd: str) -> list[str]:
    p = layout.pki
    return [
        f"--etcd-servers={etcd}", f"--bind-address={GATEWAY}", f"--advertise-address={GATEWAY}",
        f"--tls-cert-file={p}/apiserver.crt", f"--tls-private-key-file={p}/apiserver.key",
        f"--client-ca-file={p}/ca.crt", "--secure-port=6443",
        f"--kubelet-client-certificate={p}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={p}/apiserver-kubelet-client.key", f"--kubelet-certificate-authority={p}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={p}/sa.pub", f"--service-account-signing-key-file={p}/sa.key",
        "--service-account-issuer=https://kubernetes.default.svc", f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
        "--profiling=false",
    ]  # fmt: skip
