"""What this machine must be and have: Linux, root, Go, a handful of Debian packages, and nothing of another cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dpo_testing.realcluster.layout import BRIDGE, FIXED_PATHS, Layout

PACKAGES = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "gcc": "gcc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/bin/busybox": "busybox-static",
    "/usr/include/stdlib.h": "libc6-dev",
    "/sbin/modprobe": "kmod",
}
"""A program or file, and the Debian package that brings it."""

OWNED = "owned-paths"
"""A file in the run folder: fixed paths that were not there before, which are removed at the end."""
_LINKS = "links-before"
"""A file in the run folder: the virtual links that were there before, which are somebody else's."""
_CONTESTED = ("/var/lib/cni", "/var/lib/kubelet", "/run/containerd")
"""Fixed paths that another runtime or kubelet would write to as well."""
_POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian's packages ask this program whether they may start their service."""

MEMORY_BYTES = 8_000_000_000
DISK_BYTES = 30_000_000_000


class UnsuitableError(Exception):
    """This machine can't hold the cluster; the text says why and what to do."""


def unsuitable(layout: Layout) -> str | None:
    """Return why no cluster can run here, or None."""
    if sys.platform != "linux":
        return "the cluster's node is this machine, and that needs Linux"
    if os.geteuid() != 0:
        return "containers, bridges and packages need root"
    if shutil.which("go") is None:
        return "Go is not installed, so the cluster's programs cannot be built"
    if subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        return "root may not make network namespaces and mounts here (CAP_SYS_ADMIN), as in most containers"
    if not _makes_cgroups():
        return "no cgroups can be made below /sys/fs/cgroup, which the kubelet does for each pod"
    if (memory := _memory()) < MEMORY_BYTES:
        return f"{memory / 1e9:.1f} GB of memory are free; two nodes' trainers need {MEMORY_BYTES / 1e9:.0f}"
    if missing() and shutil.which("apt-get") is None:
        return f"these are missing and there is no apt-get to install them: {', '.join(missing())}"
    return _others(layout) or _room(layout)


def _others(layout: Layout) -> str | None:
    """Return which other cluster or container runtime has this machine, or None. Asked before our own starts."""
    if (layout.run / OWNED).exists():
        return None
    used = [path for path in _CONTESTED if Path(path).exists() and any(Path(path).iterdir())]
    if not used:
        return None
    return f"{', '.join(used)}: in use by another container runtime or kubelet; use E2E_KUBECONFIG for its cluster"


def _room(layout: Layout) -> str | None:
    """Return why the disk cannot hold the images, or None. Images that are built take no more."""
    folder = layout.cache
    if (folder / "built").exists():
        return None
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= DISK_BYTES:
        return None
    return (
        f"{free / 1e9:.0f} GB are free below {folder}; the trainer's image and the steps to it take"
        f" {DISK_BYTES / 1e9:.0f} GB; DPO_E2E_CACHE names another folder"
    )


def missing() -> list[str]:
    """Return the packages that are not installed yet."""
    return sorted({package for name, package in PACKAGES.items() if not _there(name)})


def install() -> None:
    """Install what is missing; no service of it is started, now or at the next boot. RuntimeError: it failed."""
    wanted = missing()
    if not wanted:
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with no_services():
        for command in (["update", "-q"], ["install", "-y", "--no-install-recommends", *wanted]):
            done = subprocess.run(["apt-get", *command], env=quiet, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"apt-get {' '.join(command)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    if "containerd" in wanted and shutil.which("systemctl") is not None:
        # The machine had none: it would hold /run/containerd from the next boot on.
        subprocess.run(["systemctl", "disable", "containerd.service"], capture_output=True, check=False)


@contextlib.contextmanager
def no_services(policy: Path = _POLICY) -> Iterator[None]:
    """Let no package start its service within the block; the machine's own policy is put back."""
    aside = policy.with_name(f"{policy.name}.dpo-e2e")
    # An aside that is there already: an earlier try was killed, and the policy in its place is ours.
    if not os.path.lexists(aside) and os.path.lexists(policy):
        policy.rename(aside)
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        if os.path.lexists(aside):
            aside.rename(policy)
        else:
            policy.unlink()


def claim(layout: Layout) -> None:
    """Refuse a machine that holds our bridge already; remember what is there, and which fixed paths are ours to remove.

    RuntimeError: an earlier cluster was not taken down, or another one of this kind runs.
    """
    owned = layout.run / OWNED
    if owned.exists():
        return
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        raise RuntimeError(f"the network link {BRIDGE} is there already: another cluster runs, or left it behind")
    layout.make()
    (layout.run / _LINKS).write_text("\n".join(virtual_links()) + "\n")
    owned.write_text("\n".join(str(path) for path in FIXED_PATHS if not path.exists()) + "\n")


def virtual_links() -> set[str]:
    """Return the ends of virtual links that this machine has now."""
    return {path.name for path in Path("/sys/class/net").glob("veth*")}


def foreign_links(layout: Layout) -> set[str]:
    """Return the virtual links that ``claim`` found; without a cluster of ours all that are there."""
    before = layout.run / _LINKS
    return set(before.read_text().split()) if before.exists() else virtual_links()


def owned_paths(layout: Layout) -> list[Path]:
    """Return the fixed paths that ``claim`` found absent."""
    owned = layout.run / OWNED
    return [Path(line) for line in owned.read_text().split()] if owned.exists() else []


def _there(name: str) -> bool:
    return Path(name).exists() if name.startswith("/") else shutil.which(name) is not None


def _makes_cgroups() -> bool:
    probe = Path("/sys/fs/cgroup/dpo-probe")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def _memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
