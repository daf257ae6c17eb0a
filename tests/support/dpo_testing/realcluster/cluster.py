"""The whole: up, as far as it is not up; facts about it; down."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dpo_api.version import VERSION
from dpo_testing.kubeapi import Api
from dpo_testing.realcluster import certificates, daemons, images, machine, node, objectstore, plane, trainingoperator
from dpo_testing.realcluster.layout import BASE_IMAGE, REPOSITORY, Layout
from dpo_testing.realcluster.steps import Steps
from dpo_testing.s3server import tool

OPERATOR_IMAGE = f"localhost/dpo-operator:{VERSION}"
TRAINER_IMAGE = f"localhost/dpo-trainer:{VERSION}-cpu"


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    layout: Layout
    steps: Steps

    @functools.cached_property
    def api(self) -> Api:
        """A client with every right."""
        return plane.admin(self.layout)

    def run(self, program: str, *words: str, stdin: str | None = None, check: bool = True, seconds: float = 180) -> str:
        """Run kubectl or helm as administrator; return what it printed."""
        folder = self.layout.run / "home"
        done = subprocess.run(
            [str(tool(program)), f"--kubeconfig={self.layout.admin}", *words],
            input=stdin, capture_output=True, text=True, check=False, timeout=seconds,
            env={**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")},
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout + (done.stderr if not check else "")

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl."""
        return self.run("kubectl", *words, stdin=stdin, check=check)

    def helm(self, *words: str, check: bool = True) -> str:
        """Run Helm."""
        return self.run("helm", *words, check=check, seconds=400)


def up(layout: Layout) -> Cluster:
    """Bring up what is not up. Every step may be repeated."""
    why = machine.unsuitable()
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


def _programs() -> None:
    wanted = [
        "etcd",
        "kube-apiserver",
        "kube-controller-manager",
        "kubectl",
        "training-operator",
        "versitygw",
        "helm",
        "prometheus",
        "scrape-config",
    ]
    for command in (wanted, ["--only", "e2e"]):
        subprocess.run([str(REPOSITORY / "hack" / "build-tools.sh"), *command], check=True, capture_output=True)


def _images(layout: Layout, steps: Steps) -> None:
    images.start_builder(layout)
    try:
        with steps.step("base image"):
            images.python_base(layout)
        with steps.step("images of the node and training-operator"):
            images.small(layout)
        version = {"VERSION": VERSION, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with steps.step("operator's image"):
            images.product(layout, "operator", OPERATOR_IMAGE, **version)
        with steps.step("trainer's image"):
            images.make_room(layout, TRAINER_IMAGE)
            images.product(layout, "trainer", TRAINER_IMAGE, target="cpu", CPU_BASE_IMAGE=BASE_IMAGE, **version)
            images.prune(layout)
    finally:
        daemons.stop(layout, "buildkitd")


def sizes(layout: Layout) -> str:
    """Return the images' sizes as JSON."""
    found = {name: images.size(layout, name) for name in (OPERATOR_IMAGE, TRAINER_IMAGE)}
    return json.dumps({Path(name).name: round(size / 1e6, 1) for name, size in found.items()})
