"""The release's life on a real API server: installed, tested, upgraded and uninstalled by Helm while jobs run.

No kubelet runs the operator's Deployment here: the test starts the operator's process with that Deployment's own
environment and as its service account. The pods of `helm test` are played the same way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_testing.chart import CHART, RELEASE, REPOSITORY, HelmError, environment, helm
from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import DPOJOBS, PODS, Object, eventually, path_of
from dpo_testing.operatorprocess import OperatorProcess
from dpo_testing.s3server import need

_ACCOUNTS = ("v1", "serviceaccounts")
_CRDS = ("apiextensions.k8s.io/v1", "customresourcedefinitions")
_CRD = "dpojobs.dpo-operator.dev"
DONE = last_words("Succeeded", step=4, total=4, runDir="s3://runs/job/", modelUri="s3://runs/job/model/")


@dataclass
class Release:
    """A release in a namespace of its own, for jobs in another."""

    cluster: ControlPlane
    home: Path
    namespace: str
    served: str

    def helm(self, *words: str, stdin: str | None = None) -> str:
        where = (f"--kubeconfig={self.cluster.kubeconfig}", f"--namespace={self.namespace}")
        return helm(*words, *where, home=self.home, stdin=stdin)

    def upgrade(self, chart: Path = CHART, **values: Any) -> str:
        """Install or upgrade. The control plane brought the definition of DPOJob itself, without Helm."""
        given = {"watchNamespaces": [self.served], "settings": {"scrape-by": "off"}, **values}
        words = ("upgrade", "--install", "--take-ownership", RELEASE, str(chart), "--values=-")
        return self.helm(*words, stdin=yaml.safe_dump(given))

    def kubeconfig(self, account: str) -> Path:
        """Return a kubeconfig with a token of a service account of the release."""
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        path = path_of(_ACCOUNTS, self.namespace, account, "token")
        config = json.loads(self.cluster.kubeconfig.read_text())
        token = self.cluster.admin.call("POST", path, request)["status"]["token"]
        config["users"][0]["user"] = {"token": token}
        file = self.home / f"{account}.kubeconfig"
        file.write_text(json.dumps(config))
        return file

    def operator(self, repository: Path = REPOSITORY) -> OperatorProcess:
        """Return the process that the release's Deployment would run, as its service account."""
        deployment = self.cluster.admin.get(("apps/v1", "deployments"), self.namespace, RELEASE)
        variables = environment(deployment)
        account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
        return OperatorProcess(self.kubeconfig(account), environment=variables, repository=repository)


@pytest.fixture
def release(cluster: ControlPlane, kubelet: FakeKubelet, namespace: str, tmp_path: Path) -> Iterator[Release]:
    need("helm")
    with cluster.namespace("release") as own:
        made = Release(cluster, tmp_path, own, namespace)
        yield made
        if json.loads(made.helm("list", "--output=json")):
            made.helm("uninstall", RELEASE)
        cluster.kubectl("replace", "-f", str(REPOSITORY / "crds" / "dpojobs.yaml"))


def second_build(folder: Path) -> Path:
    """Return a copy of this tree of another version, with one more optional field, and its chart generated."""
    for name in ("crds", "operator", "charts/dpo-operator"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "hack").mkdir()
    shutil.copy(REPOSITORY / "hack" / "chart.py", folder / "hack")
    (folder / "crds" / "dpo_api" / "version.py").write_text('VERSION = "0.2.0"\n')
    running = folder / "crds" / "dpo_api" / "running.py"
    field = '    remark: str | None = Field(default=None, max_length=64, description="A field of the next version.")\n'
    before = "    uri: Uri | None = Field(\n"
    head, found, tail = running.read_text().partition("class Checkpoint(Section):")
    assert found
    assert before in tail
    running.write_text(head + found + tail.replace(before, field + before, 1))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder / room) for room in ("crds", "operator"))}

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True).stdout

    (folder / "crds" / "dpojobs.yaml").write_text(python("-m", "dpo_api.crd"))
    python("hack/chart.py")
    return folder


def snapshot(release: Release, job: str) -> Object:
    """Return what an upgrade must leave alone: a job's child, pods and pinned spec, its attempts and its image."""
    api, namespace = release.cluster.admin, release.served
    status = Jobs(api, namespace).status(job)
    things = {
        kind: {
            thing["metadata"]["name"]: (thing["metadata"]["uid"], thing.get("spec"), thing.get("data"))
            for thing in api.list((version, kind), namespace, labelSelector=f"dpo-operator.dev/job={job}")
        }
        for version, kind in (("kubeflow.org/v1", "pytorchjobs"), ("v1", "pods"), ("v1", "configmaps"))
    }
    assert all(things.values()), things
    attempts = [(attempt["number"], attempt.get("result")) for attempt in status["attempts"]]
    return {**things, "attempts": attempts, "state": status["state"], "image": status["image"]}


def without_image(name: str, **spec: Any) -> Object:
    body = manifest(name, **spec)
    del body["spec"]["image"]
    return body


def test_an_upgrade_leaves_running_jobs_alone_and_uninstalling_keeps_them(
    release: Release, kubelet: FakeKubelet, tmp_path: Path
) -> None:
    jobs, served = Jobs(release.cluster.admin, release.served), release.served
    said = release.upgrade(trainer={"image": {"repository": "registry.example.com/trainer", "tag": "old"}})
    assert f"serves the namespaces {served}" in said
    assert "✓ PyTorchJob" in said
    with release.operator() as operator:
        jobs.create(without_image("old", nodes=2, run_policy={"maxRestarts": 1}))
        jobs.wait_state("Running", name="old")
        assert operator.exceptions() == []
    before = snapshot(release, "old")
    assert before["image"] == "registry.example.com/trainer:old"

    newer = second_build(tmp_path / "newer")
    release.upgrade(
        newer / "charts" / "dpo-operator",
        trainer={"image": {"repository": "registry.example.com/trainer", "tag": "new"}},
        settings={"resync-seconds": 1},
    )
    with release.operator(newer) as operator:
        assert operator.metric('dpo_operator_info{version="0.2.0"}') == 1
        jobs.create(without_image("new", checkpoint={"uri": "s3://runs/new/", "remark": "of the next version"}))
        assert jobs.wait_state("Running", name="new")["image"] == "registry.example.com/trainer:new"
        assert jobs.get("new")["spec"]["checkpoint"]["remark"] == "of the next version"
        passes = operator.passes()
        eventually(lambda: operator.passes() >= passes + 5, what="every job has been looked at several times")
        assert snapshot(release, "old") == before
        # Its next attempt runs what the job was accepted with.
        kubelet.finish(served, "old-1-master-0", last_words("Communication", message="lost a peer"), 75)
        child = jobs.wait_child("old-2")
        template = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
        assert template["containers"][0]["image"] == "registry.example.com/trainer:old"
        kubelet.finish(served, "old-2-master-0", DONE)
        jobs.wait_state("Succeeded", name="old")
        assert operator.exceptions() == []
        assert 'cause="403"' not in operator.get("/metrics")[1]

        after = snapshot(release, "new")
        release.helm("uninstall", RELEASE)
    assert release.cluster.admin.find(_CRDS, None, _CRD) is not None
    assert snapshot(release, "new") == after
    assert release.cluster.admin.find(_ACCOUNTS, release.namespace, RELEASE) is None


class Play:
    """`helm test` with its pods played: what each would run is run here, as its service account."""

    def __init__(self, release: Release, kubelet: FakeKubelet) -> None:
        self.release, self.kubelet = release, kubelet
        self.name = f"{RELEASE}-test"

    def command(self, pod: Object) -> tuple[list[str], dict[str, str]]:
        """Return a pod's own command line and environment, with its mounted manifest and token."""
        manifests = self.release.cluster.admin.get(("v1", "configmaps"), self.release.namespace, self.name)
        file = self.release.home / "job.yaml"
        file.write_text(manifests["data"]["job.yaml"])
        words = [word for word in pod["spec"]["containers"][0]["command"][1:] if not word.startswith("--file=")]
        config = self.release.kubeconfig(pod["spec"]["serviceAccountName"])
        return [sys.executable, *words, f"--file={file}"], {**os.environ, "KUBECONFIG": str(config)}

    def clear_and_make(self) -> Object:
        """Play the pods before the last one; return that one, which runs now."""
        pod = self.kubelet.pod(self.release.namespace, f"{self.name}-clear")
        words, variables = self.command(pod)
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        self.kubelet.exit(pod, 0)
        self.kubelet.finish(self.release.served, f"{self.name}-data")
        return self.kubelet.pod(self.release.namespace, self.name)


@pytest.mark.nightly  # the end-to-end suite runs `helm test` too
def test_helm_test_fails_with_a_reason_and_passes_once_it_is_gone(release: Release, kubelet: FakeKubelet) -> None:
    """Hooks in order, rights that suffice, a spec that is accepted. The e2e suite trains one."""
    release.upgrade(test={"spec": {"runPolicy": {"maxRestarts": 0}}})
    api, play = release.cluster.admin, Play(release, kubelet)
    with release.operator(), ThreadPoolExecutor(1) as pool:
        tested = pool.submit(release.helm, "test", RELEASE, "--timeout=300s")
        reporter = play.clear_and_make()
        words, variables = play.command(reporter)
        with subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as test:
            kubelet.finish(release.served, f"{play.name}-1-master-0", last_words("DataError", message="no pairs"), 65)
            _, err = test.communicate(timeout=240)
        kubelet.exit(reporter, test.returncode)
        assert test.returncode == 1
        assert err.startswith("error: ")
        assert "ended as Failed" in err
        with pytest.raises(HelmError):
            tested.result()
        assert api.find(DPOJOBS, release.served, play.name) is not None, "it is left to be looked at"

        tested = pool.submit(release.helm, "test", RELEASE, "--timeout=300s")
        reporter = play.clear_and_make()
        words, variables = play.command(reporter)
        with subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as test:
            kubelet.finish(release.served, f"{play.name}-1-master-0", DONE)
            out, err = test.communicate(timeout=240)
        kubelet.exit(reporter, test.returncode)
        assert (test.returncode, err) == (0, "")
        assert "it works: s3://runs/job/model/" in out
        assert "Phase:          Succeeded" in tested.result()
    assert api.find(DPOJOBS, release.served, play.name) is None, "the test's job is deleted"
    assert api.find(PODS, release.namespace, play.name) is not None, "its log stays"
    claim = ("v1", "persistentvolumeclaims")
    eventually(lambda: api.find(claim, release.served, play.name) is None, what="the claim is gone")


@pytest.mark.nightly  # tests/charts/test_chart_trial.py has what it says, the end-to-end suite runs `helm test`
def test_helm_test_reports_a_spec_that_cannot_run(release: Release, kubelet: FakeKubelet) -> None:
    release.upgrade(test={"spec": {"tokenizer": {"uri": "/no/volume/of/the/pods"}}})
    play = Play(release, kubelet)
    with release.operator(), ThreadPoolExecutor(1) as pool:
        tested = pool.submit(release.helm, "test", RELEASE, "--timeout=300s")
        reporter = play.clear_and_make()
        words, variables = play.command(reporter)
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False, timeout=240)
        kubelet.exit(reporter, done.returncode)
        with pytest.raises(HelmError):
            tested.result()
    assert done.returncode == 1
    assert "ended as Rejected" in done.stderr
    assert "Traceback" not in done.stderr
