"""The whole: up, as far as it is not up; facts about it; down."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpo_api.version import VERSION
from dpo_testing.kubeapi import Api
from dpo_testing.realcluster import certificates, daemons, images, machine, node, objectstore, plane, trainingoperator
from dpo_testing.realcluster.layout import BASE_IMAGE, REPOSITORY, Layout
from dpo_testing.realcluster.steps import Steps
from dpo_testing.s3server import tool

OPERATOR_IMAGE = os.environ.get("E2E_OPERATOR_IMAGE") or f"localhost/dpo-operator:{VERSION}"
TRAINER_IMAGE = os.environ.get("E2E_TRAINER_IMAGE") or f"localhost/dpo-trainer:{VERSION}-cpu"
_PROXY_PORT = 8901


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    layout: Layout
    steps: Steps
    given: Path | None = None
    """The kubeconfig of somebody else's cluster; None: the cluster is this machine."""

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.given or self.layout.admin

    @functools.cached_property
    def api(self) -> Api:
        """A client with every right."""
        return plane.admin(self.layout) if self.given is None else Api(f"http://127.0.0.1:{_PROXY_PORT}")

    def run(self, program: str, *words: str, stdin: str | None = None, check: bool = True, seconds: float = 180) -> str:
        """Run kubectl or helm as administrator; return what it printed."""
        folder = self.layout.run / "home"
        done = subprocess.run(
            [str(tool(program)), f"--kubeconfig={self.kubeconfig}", *words],
            input=stdin, capture_output=True, text=True, check=False, timeout=seconds,
            env={**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")},
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout + (done.stderr if not check else "")

    def dpo(self, *words: str, seconds: float = 180) -> str:
        """Run `dpo` as its users do, with kubectl on the PATH; return its standard output."""
        path = f"{tool('kubectl').parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [sys.executable, "-m", "dpo_cli", *words, "--kubeconfig", str(self.kubeconfig)],
            capture_output=True, text=True, check=False, timeout=seconds,
            env={**os.environ, "HOME": str(self.layout.run / "home"), "PATH": path},
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"dpo {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl."""
        return self.run("kubectl", *words, stdin=stdin, check=check)

    def helm(self, *words: str, check: bool = True) -> str:
        """Run Helm."""
        return self.run("helm", *words, check=check, seconds=400)


def up(layout: Layout) -> Cluster:
    """Bring up what is not up. Every step may be repeated."""
    why = machine.unsuitable(layout)
    if why is not None:
        raise machine.UnsuitableError(why)
    steps = Steps(layout.run / "times.jsonl")
    machine.claim(layout)
    layout.make()
    with steps.step("packages of the system"):
        machine.install()
    with steps.step("programs of the cluster"):
        _programs()
    with steps.step("containerd and network"):
        node.network(layout)
        node.containers(layout)
    _images(layout, steps)
    with steps.step("control plane"):
        certificates.make(layout)
        plane.start(layout)
    cluster = Cluster(layout, steps)
    with steps.step("node: kubelet, proxy, DNS"):
        node.start(layout, cluster.api)
    with steps.step("S3 server"):
        objectstore.start(layout)
    with steps.step("training-operator"):
        trainingoperator.install(cluster)
    return cluster


def attached(layout: Layout) -> Cluster | None:
    """Return the cluster that is up, as it is; None when there is none."""
    up = all(daemons.running(layout, name) for name in ("kubelet", "kube-apiserver", "versitygw", "containerd"))
    return Cluster(layout, Steps(layout.run / "times.jsonl")) if up else None


@contextlib.contextmanager
def existing(kubeconfig: Path) -> Iterator[Cluster]:
    """Yield somebody else's cluster, reached through `kubectl proxy`, whatever its kubeconfig's way to log in is."""
    layout = Layout.default()
    layout.make()
    (layout.run / "times.jsonl").unlink(missing_ok=True)
    cluster = Cluster(layout, Steps(layout.run / "times.jsonl"), kubeconfig)
    words = [str(tool("kubectl")), f"--kubeconfig={kubeconfig}", "proxy", f"--port={_PROXY_PORT}"]
    daemons.start(layout, "kubectl-proxy", words)
    try:
        daemons.wait_until(layout, "kubectl-proxy", lambda: bool(cluster.api.call("GET", "/version", timeout=2.0)))
        yield cluster
    finally:
        daemons.stop(layout, "kubectl-proxy")


def _programs() -> None:
    done = subprocess.run(
        [str(REPOSITORY / "hack" / "build-tools.sh"), "e2e"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"hack/build-tools.sh e2e failed:\n{done.stderr[-3000:]}")


def _images(layout: Layout, steps: Steps) -> None:
    images.start_builder(layout)
    try:
        with steps.step("base image"):
            images.python_base(layout)
        with steps.step("images of the node and training-operator"):
            images.small(layout)
        with steps.step("operator's image"):
            images.product(layout, "operator", OPERATOR_IMAGE, VERSION=VERSION)
        with steps.step("trainer's image"):
            images.make_room(layout, TRAINER_IMAGE)
            images.product(layout, "trainer", TRAINER_IMAGE, target="cpu", VERSION=VERSION)
            images.prune(layout)
    finally:
        daemons.stop(layout, "buildkitd")


def sizes(layout: Layout) -> str:
    """Return the images' sizes, unpacked, and their base's."""
    names = (BASE_IMAGE, OPERATOR_IMAGE, TRAINER_IMAGE)
    return ", ".join(f"{name.partition('/')[2]} {images.size(layout, name) / 1e6:.0f} MB" for name in names)
