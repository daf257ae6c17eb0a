"""Where the cluster's things lie, and the numbers that its programs agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[4]

NODE = "node1"
BRIDGE = "dpo-cni0"
GATEWAY = "10.244.0.1"
"""The node's address, the API server's, DNS', the S3 server's and the pods' gateway: one bridge, nothing outside."""
POD_RANGE = "10.244.0.0/24"
SERVICE_RANGE = "10.96.0.0/16"
API_SERVER = f"https://{GATEWAY}:6443"
S3_PORT = 7480

PAUSE_IMAGE = "localhost/pause:3.10"
BUSYBOX_IMAGE = "localhost/busybox:1"
BASE_IMAGE = "localhost/python-base:3.12"
TRAINING_OPERATOR_IMAGE = "localhost/training-operator:v1.9.4"

FIXED_PATHS = tuple(
    Path(path)
    for path in (
        "/var/lib/cni",
        "/var/lib/kubelet",
        "/var/log/containers",
        "/var/log/pods",
        "/run/containerd",
        "/usr/libexec/kubernetes",
        "/etc/cni",
        "/opt/cni",
    )
)
"""Folders that no setting moves: if they are there before we start, they are somebody else's."""


@dataclass(frozen=True)
class Layout:
    """``run`` is wiped at the end; ``cache`` stays: images, build snapshots, the base system, the base model."""

    run: Path
    cache: Path

    @classmethod
    def default(cls) -> Layout:
        """Return the folders of this machine's one cluster."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = Path(os.environ.get("DPO_E2E_CACHE") or home / "dpo-operator" / "e2e")
        return cls(Path(os.environ.get("DPO_E2E_RUN") or "/var/lib/dpo-e2e"), cache)

    def make(self) -> None:
        """Make the folders."""
        for folder in (self.run, self.cache, self.pki, self.logs, self.pids, self.etc):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def pki(self) -> Path:
        """Certificates, keys and kubeconfigs."""
        return self.run / "pki"

    @property
    def logs(self) -> Path:
        """One log a program."""
        return self.run / "logs"

    @property
    def pids(self) -> Path:
        """One file a running program."""
        return self.run / "pids"

    @property
    def etc(self) -> Path:
        """Configuration files."""
        return self.run / "etc"

    @property
    def containerd_socket(self) -> Path:
        """Our containerd's; never the system's."""
        return self.run / "containerd.sock"

    @property
    def buildkit_socket(self) -> Path:
        """BuildKit's."""
        return self.run / "buildkitd.sock"

    @property
    def admin(self) -> Path:
        """The administrator's kubeconfig."""
        return self.pki / "admin.kubeconfig"

    def kubeconfig(self, name: str) -> Path:
        """Return the kubeconfig of one of the cluster's programs."""
        return self.pki / f"{name}.kubeconfig"
