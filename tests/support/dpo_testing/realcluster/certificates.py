"""Certificates and kubeconfigs of the cluster's programs: made once a cluster, in under a second."""

from __future__ import annotations

from dpo_testing.controlplane import kubeconfig
from dpo_testing.pki import Authority, service_account_keys
from dpo_testing.realcluster.layout import API_SERVER, GATEWAY, NODE, Layout

_CLIENTS = {
    "admin": ("admin", ["system:masters"]),
    "kube-controller-manager": ("system:kube-controller-manager", []),
    "kube-scheduler": ("system:kube-scheduler", []),
    "kube-proxy": ("system:kube-proxy", []),
    "kubelet": (f"system:node:{NODE}", ["system:nodes"]),
    "apiserver-kubelet-client": ("kube-apiserver-kubelet-client", ["system:masters"]),
}
_API_SERVER_NAMES = (
    "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
    "127.0.0.1", GATEWAY, "10.96.0.1",
)  # fmt: skip


def make(layout: Layout) -> None:
    """Write everything below ``pki`` unless it is there."""
    if layout.admin.exists():
        return
    authority = Authority("dpo-e2e-ca")
    ca, _ = authority.pair.write(layout.pki, "ca")
    authority.server("kube-apiserver", _API_SERVER_NAMES).write(layout.pki, "apiserver")
    authority.server("kubelet", [NODE, GATEWAY]).write(layout.pki, "kubelet-serving")
    service_account_keys(layout.pki)
    # The administrator's comes last: it says that the others are there.
    for name, (user, groups) in reversed(_CLIENTS.items()):
        certificate, key = authority.client(user, groups).write(layout.pki, name)
        path = layout.kubeconfig(name)
        path.touch(mode=0o600)
        path.write_text(kubeconfig(API_SERVER, ca, certificate, key))
