"""Taking the cluster down: everything that it made on this machine goes, and what is left over is named."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from dpo_testing.realcluster import daemons, machine, node
from dpo_testing.realcluster.layout import BRIDGE, Layout
from dpo_testing.s3server import tool

_FAST = ("kube-apiserver", "etcd")
"""Their state is thrown away: SIGTERM would only cost time."""
_ORDER = ("prometheus", "versitygw", "buildkitd", "kubelet")
_LAST = ("kube-proxy", "coredns", "kube-scheduler", "kube-controller-manager", *_FAST)
_CGROUPS = ("kubepods", "k8s.io", "buildkit")
_CHAINS = ("KUBE-", "CNI-")
_NAMESPACES = Path("/run/netns")


def down(layout: Layout) -> None:
    """Take down whatever is up. Works on half of a cluster too, and twice."""
    if not layout.run.exists():
        return
    for name in _ORDER:
        daemons.stop(layout, name)
    if daemons.running(layout, "containerd") is None and (layout.etc / "containerd.toml").exists():
        with contextlib.suppress(RuntimeError):
            node.containers(layout)  # to end what its shims hold
    _end_containers(layout)
    daemons.stop(layout, "containerd")
    daemons.stop(layout, "kube-proxy")
    if (layout.etc / "kube-proxy.json").exists():
        command = [str(tool("kube-proxy")), "--cleanup", f"--config={layout.etc}/kube-proxy.json"]
        subprocess.run(command, capture_output=True, check=False, timeout=60)
    for name in (*_LAST, *daemons.names(layout)):
        daemons.stop(layout, name, signal.SIGKILL if name in _FAST else signal.SIGTERM)
    _unmount(layout)
    _network(layout)
    _cgroups()
    for path in machine.owned_paths(layout):
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(layout.run)


def leftovers(layout: Layout, foreign_links: set[str]) -> list[str]:
    """Return what of a cluster is still on this machine, each as a line. ``foreign_links`` were there before it."""
    found = [f"mount {point}" for point in _mounts(layout)]
    found += [f"link {BRIDGE}"] if Path(f"/sys/class/net/{BRIDGE}").exists() else []
    found += [f"network namespace {path}" for path in _NAMESPACES.glob("cni-*")]
    found += [f"link {name}" for name in sorted(machine.virtual_links() - foreign_links)]
    for tables in ("iptables", "ip6tables"):
        found += [f"{tables} {line}" for line in _rules(tables)]
    found += [f"cgroup {path}" for path in _our_cgroups()]
    found += [f"process {line}" for line in _processes(layout)]
    found += [f"folder {layout.run}"] if layout.run.exists() else []
    return found


def _end_containers(layout: Layout) -> None:
    if daemons.running(layout, "containerd") is not None:
        for task in node.ctr(layout, "tasks", "ls", "-q").stdout.split():
            node.ctr(layout, "tasks", "rm", "--force", task)
        for container in node.ctr(layout, "containers", "ls", "-q").stdout.split():
            node.ctr(layout, "containers", "rm", container)
    for pid in _shims(layout):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in _NAMESPACES.glob("cni-*"):
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)
        path.unlink(missing_ok=True)


def _shims(layout: Layout) -> list[int]:
    return [int(line.split()[0]) for line in _processes(layout) if "containerd-shim" in line]


def _processes(layout: Layout) -> list[str]:
    """Return 'pid command' of every process that names the run folder and is not one that looks at it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").replace("\0", " ").strip()
            if f"{layout.run}/" in words and int(path.parent.name) != os.getpid() and "realcluster" not in words:
                program = words.split()[0].rpartition("/")[2]
                if program not in {"bash", "sh", "tail", "less", "grep", "timeout", "nice", "flock"}:
                    found.append(f"{path.parent.name} {words[:120]}")
    return found


def _mounts(layout: Layout) -> list[str]:
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [point for point in reversed(points) if point.startswith((f"{layout.run}/", f"{layout.cache}/"))]


def _unmount(layout: Layout) -> None:
    for point in _mounts(layout):
        subprocess.run(["umount", "-l", point], capture_output=True, check=False)


def _rules(tables: str) -> list[str]:
    done = subprocess.run([f"{tables}-save"], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if any(chain in line for chain in _CHAINS)]


def _network(layout: Layout) -> None:
    for tables in ("iptables", "ip6tables"):
        if _rules(tables):
            _drop_rules(tables)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
    before = layout.run / "ip_forward"
    if before.exists():
        node.FORWARDING.write_text(before.read_text())


def _drop_rules(tables: str) -> None:
    """Delete only the rules and chains of Kubernetes and CNI, table by table."""
    saved = subprocess.run([f"{tables}-save"], capture_output=True, text=True, check=True).stdout
    table, deletions, chains = "", [], []
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":") and any(line.startswith(f":{name}") for name in _CHAINS):
            chains.append((table, line[1:].split()[0]))
        elif line.startswith("-A ") and any(name in line for name in _CHAINS):
            if line.startswith(tuple(f"-A {name}" for name in _CHAINS)):
                continue  # it goes with its chain
            deletions.append((table, line))
    for of, line in deletions:
        # A rule may hold quoted comments: the shell's own quoting reads them back.
        subprocess.run(f"{tables} -t {of} -D {line.removeprefix('-A ')}", shell=True, capture_output=True, check=False)  # noqa: S602 - a line of iptables-save, whose quoting is the shell's
    for word in ("-F", "-X"):
        for of, chain in chains:
            subprocess.run([tables, "-t", of, word, chain], capture_output=True, check=False)


def _our_cgroups() -> list[Path]:
    root = Path("/sys/fs/cgroup")
    return sorted({path for name in _CGROUPS for depth in ("", "*/") for path in root.glob(f"{depth}{name}")})


def _cgroups() -> None:
    for top in _our_cgroups():
        for folder in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            top.rmdir()
