"""`make e2e` with E2E_KUBECONFIG, where others live on the cluster too: what is theirs is refused first, and stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_testing.controlplane import ControlPlane
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import eventually
from dpo_testing.realcluster import cluster as real
from dpo_testing.realcluster import release, story
from dpo_testing.realcluster.watching import Run
from dpo_testing.s3server import need, s3_server

NAMESPACES = ("v1", "namespaces")
DEFINITIONS = ("apiextensions.k8s.io/v1", "customresourcedefinitions")
DEFINITION = "dpojobs.dpo-operator.dev"
RELEASE = {"meta.helm.sh/release-name": release.NAME, "meta.helm.sh/release-namespace": release.NAMESPACE}


@pytest.fixture
def given(cluster: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[real.Cluster]:
    """The control plane, as the story sees a cluster that it is given."""
    need("helm", "kubectl")
    monkeypatch.setenv("DPO_E2E_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("DPO_E2E_CACHE", str(tmp_path / "cache"))
    with s3_server() as store:
        monkeypatch.setenv("E2E_S3_ENDPOINT", store.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.secret_key)
        with real.existing(cluster.kubeconfig) as found:
            yield found


@pytest.fixture
def installed_by_the_story(cluster: ControlPlane) -> Iterator[None]:
    cluster.admin.patch(DEFINITIONS, None, DEFINITION, {"metadata": {"annotations": RELEASE}})
    yield
    cluster.admin.patch(DEFINITIONS, None, DEFINITION, {"metadata": {"annotations": dict.fromkeys(RELEASE)}})


def test_another_installation_is_refused_and_stays(cluster: ControlPlane, given: real.Cluster) -> None:
    assert "another installation" in (story.refusal(given) or "")
    story.take_away(given)
    assert "deletionTimestamp" not in cluster.admin.get(DEFINITIONS, None, DEFINITION)["metadata"]


@pytest.mark.parametrize("name", [pytest.param(story.JOBS, marks=pytest.mark.nightly), release.NAMESPACE])
def test_a_namespace_of_somebody_else_is_refused_and_stays(
    cluster: ControlPlane, given: real.Cluster, installed_by_the_story: None, jobs: Jobs, name: str
) -> None:
    jobs.create(manifest())
    cluster.admin.create(NAMESPACES, None, {"metadata": {"name": name}})
    try:
        assert f"namespace {name} without" in (story.refusal(given) or "")
        story.take_away(given)
        assert "deletionTimestamp" not in cluster.admin.get(NAMESPACES, None, name)["metadata"]
    finally:
        cluster.admin.delete(NAMESPACES, None, name)
        eventually(lambda: cluster.admin.find(NAMESPACES, None, name) is None, what=f"{name} is gone")


def test_the_story_uses_dpo_as_a_user_does(given: real.Cluster, jobs: Jobs) -> None:
    run = Run(given, jobs, "submitted")
    body = manifest(run.name, run_policy={"suspend": True})
    assert run.submit(body).startswith("dpojob.dpo-operator.dev/submitted serverside-applied")
    assert run.dpo("resume") == "dpojob.dpo-operator.dev/submitted resumed\n"
    assert "Pending" in run.dpo("status")
    with pytest.raises(RuntimeError, match="is Pending: only a job that failed is retried"):
        run.dpo("retry")


def test_the_storys_own_namespaces_go_and_the_definition_stays_while_others_have_jobs(
    cluster: ControlPlane, given: real.Cluster, installed_by_the_story: None, jobs: Jobs
) -> None:
    jobs.create(manifest())
    for name in (story.JOBS, release.NAMESPACE):
        release.make_namespace(given, name)
    assert story.refusal(given) is None
    story.take_away(given)
    for name in (story.JOBS, release.NAMESPACE):
        assert cluster.admin.find(NAMESPACES, None, name) is None
    assert jobs.get()["metadata"].get("deletionTimestamp") is None
