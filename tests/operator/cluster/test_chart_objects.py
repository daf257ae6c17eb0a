"""Every object of the chart is one that a real API server takes, no unknown field, under restricted Pod Security."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path

import pytest

from dpo_testing.chart import CHART, COMBINATIONS, NAMESPACE, pick, render
from dpo_testing.controlplane import ControlPlane
from dpo_testing.kubeapi import ApiError, Object, eventually, path_of
from dpo_testing.s3server import module_of, need

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
MONITORS = ("podmonitors", "prometheusrules", "servicemonitors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("helm")
    return tmp_path_factory.mktemp("helm")


@pytest.fixture(scope="module")
def prepared(cluster: ControlPlane) -> ControlPlane:
    """The cluster with the namespaces that the combinations name and the kinds of Prometheus' operator."""
    module = module_of("github.com/prometheus-operator/prometheus-operator")
    definitions = module / "example" / "prometheus-operator-crd"
    for plural in MONITORS:
        cluster.install_crd(definitions / f"monitoring.coreos.com_{plural}.yaml")
    for name in (NAMESPACE, "team-a", "team-b", "monitoring"):
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}
        cluster.admin.apply(("v1", "namespaces"), None, body)
        eventually(lambda name=name: cluster.admin.find(("v1", "serviceaccounts"), name, "default"))  # type: ignore[misc]
    return cluster


def resource_of(cluster: ControlPlane, thing: Object) -> tuple[tuple[str, str], str | None]:
    """Return where the API server keeps objects of this kind, and the namespace of this one."""
    plural, namespaced = _kinds(cluster, thing["apiVersion"])[thing["kind"]]
    namespace = thing["metadata"].get("namespace")
    assert (namespace is not None) == namespaced, f"{thing['kind']} {thing['metadata']['name']}: namespace {namespace}"
    return (thing["apiVersion"], plural), namespace


@cache
def _kinds(cluster: ControlPlane, version: str) -> dict[str, tuple[str, bool]]:
    listed = cluster.admin.call("GET", path_of((version, ""))[:-1])["resources"]
    return {kind["kind"]: (kind["name"], kind["namespaced"]) for kind in listed if "/" not in kind["name"]}


def dry_run(cluster: ControlPlane, thing: Object) -> Object:
    """Apply an object without storing it; an unknown field is an error."""
    resource, namespace = resource_of(cluster, thing)
    done: Object = cluster.admin.call(
        "PATCH", path_of(resource, namespace, thing["metadata"]["name"]), thing,
        content_type="application/apply-patch+yaml",
        fieldManager="chart", force="true", fieldValidation="Strict", dryRun="All",
    )  # fmt: skip
    return done


def account(cluster: ControlPlane, pod: Object) -> None:
    """Make the service account of a pod: a dry run makes none, and without it the pod is refused."""
    name, namespace = pod["spec"].get("serviceAccountName", "default"), pod["metadata"]["namespace"]
    body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
    cluster.admin.apply(("v1", "serviceaccounts"), namespace, body)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_object_is_taken(prepared: ControlPlane, home: Path, name: str) -> None:
    objects = render(COMBINATIONS[name], home=home)
    template = pick(objects, "Deployment")["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
    pod["metadata"] |= {"name": "operator", "namespace": NAMESPACE}
    pod["spec"].pop("priorityClassName", None)  # made by the same release: not there in a dry run
    for thing in [*objects, pod]:
        if thing["kind"] == "Pod":
            account(prepared, thing)
        dry_run(prepared, thing)


def test_a_field_that_kubernetes_does_not_know_is_refused(prepared: ControlPlane, home: Path) -> None:
    """The test above would see a mistake of the chart."""
    deployment = copy.deepcopy(pick(render(home=home), "Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(ApiError, match="readinesProbe"):
        dry_run(prepared, deployment)


def test_a_pod_that_may_be_root_is_refused(prepared: ControlPlane, home: Path) -> None:
    pod = copy.deepcopy(pick(render(home=home), "Pod", "-test"))
    account(prepared, pod)
    del pod["spec"]["containers"][0]["securityContext"]
    with pytest.raises(ApiError, match="violates PodSecurity"):
        dry_run(prepared, pod)


def test_the_readmes_patch_mounts_the_template_into_training_operator(
    prepared: ControlPlane, home: Path, namespace: str
) -> None:
    readme = (CHART / "README.md").read_text()
    found = re.search(r"patch deployment training-operator --type=strategic -p '(.*?)'\n", readme, re.DOTALL)
    assert found is not None
    module = module_of("github.com/kubeflow/training-operator")
    deployment = module / "manifests" / "base" / "deployment.yaml"
    prepared.kubectl("apply", "-n", namespace, "-f", str(deployment))
    patch = ("patch", "deployment", "training-operator", "-n", namespace, "--type=strategic", "-p", found[1])
    made = json.loads(prepared.kubectl(*patch, "--dry-run=server", "-o", "json").stdout)["spec"]["template"]["spec"]
    (container,) = made["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {"/tmp/k8s-webhook-server/serving-certs", "/etc/config"}
    volumes = {volume["name"]: volume for volume in made["volumes"]}
    template = pick(render(COMBINATIONS["everything"], home=home), "ConfigMap", "training-operator-init-container")
    assert volumes[mounts["/etc/config"]]["configMap"]["name"] == template["metadata"]["name"]
    assert container["command"] == ["/manager"]
