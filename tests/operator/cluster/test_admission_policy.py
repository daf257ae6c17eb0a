"""What the chart's ValidatingAdmissionPolicies let the operator's service account create, on a real API server."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_operator.backend import podpatch, pytorchjob
from dpo_operator.backend.pytorchjob import Identity
from dpo_testing.chart import NAMESPACE, RELEASE, render
from dpo_testing.controlplane import ControlPlane
from dpo_testing.jobs import manifest
from dpo_testing.kubeapi import (
    CONFIGMAPS,
    DPOJOBS,
    NETWORK_POLICIES,
    PYTORCHJOBS,
    Api,
    ApiError,
    Object,
    eventually,
    path_of,
)
from dpo_testing.s3server import need

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = sorted((ROOT / "tests" / "golden" / "child").glob("*.yaml"))
PATCHES = sorted((ROOT / "examples" / "pod-patches").glob("*.yaml"))
RESOURCES = {"PyTorchJob": PYTORCHJOBS, "ConfigMap": CONFIGMAPS, "NetworkPolicy": NETWORK_POLICIES}
_KIND = "admissionregistration.k8s.io/v1"
_POLICIES, _BINDINGS = (_KIND, "validatingadmissionpolicies"), (_KIND, "validatingadmissionpolicybindings")
USER = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"


def install(
    cluster: ControlPlane, home: Path, *, namespace: str = NAMESPACE, **values: Any
) -> list[tuple[tuple[str, str], str]]:
    """Apply the policies of a release; return what was applied."""
    objects = render({"admissionPolicy": {"enabled": "always"}, **values}, home=home, namespace=namespace)
    kinds = {"ValidatingAdmissionPolicy": _POLICIES, "ValidatingAdmissionPolicyBinding": _BINDINGS}
    mine = [thing for thing in objects if thing["kind"] in kinds]
    assert len(mine) == 4
    for thing in mine:
        cluster.admin.apply(kinds[thing["kind"]], None, thing)
    return [(kinds[thing["kind"]], thing["metadata"]["name"]) for thing in mine]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("helm")
    return tmp_path_factory.mktemp("helm")


@pytest.fixture(scope="module")
def restricted(cluster: ControlPlane, home: Path) -> Iterator[Api]:
    """The operator's identity, with every right, so that only the policies refuse something."""
    made = install(cluster, home)
    api = cluster.api(USER, ["system:masters"])
    free: Object = {"kind": "ConfigMap", "metadata": {"name": "free"}}
    eventually(lambda: refusal(api, "default", free), what="the policy of owners is in force")
    wrong = _pod(VIOLATIONS["the host's IPC"][0])
    eventually(lambda: refusal(api, "default", wrong), what="the policy of pods is in force")
    yield api
    for resource, name in reversed(made):
        cluster.admin.delete(resource, None, name)


def owner() -> Object:
    return pytorchjob.owner_reference(Identity(name="job", namespace="default", uid="uid-1"))


def refusal(api: Api, namespace: str, thing: Object) -> str:
    """Return the message with which a dry run is refused; empty if it is not."""
    try:
        api.call("POST", path_of(RESOURCES[thing["kind"]], namespace), thing, dryRun="All")
    except ApiError as error:
        if error.status not in (403, 422) or "ValidatingAdmissionPolicy" not in error.message:
            raise
        return error.message
    return ""


def golden(path: Path) -> list[Object]:
    """Return the objects of a golden file, owned as on a cluster."""
    objects: list[Object] = list(yaml.safe_load_all(path.read_text()))
    for thing in objects:
        thing["metadata"]["ownerReferences"] = [owner()]
        thing["metadata"].pop("namespace", None)
    return objects


def child() -> Object:
    return next(thing for thing in golden(GOLDEN[0]) if thing["kind"] == "PyTorchJob")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_everything_that_the_operator_creates_is_allowed(restricted: Api, namespace: str, path: Path) -> None:
    objects = golden(path)
    assert {thing["kind"] for thing in objects} == set(RESOURCES)
    assert [refusal(restricted, namespace, thing) for thing in objects] == [""] * len(objects)


@pytest.mark.parametrize("kind", RESOURCES)
@pytest.mark.parametrize(
    "owners",
    [[], [owner() | {"kind": "Job", "apiVersion": "batch/v1"}], [owner() | {"apiVersion": "example.com/v1"}],
     [owner() | {"controller": False}]],
    ids=["none", "another kind", "another group", "not the controller"],
)  # fmt: skip
def test_an_object_without_a_dpojob_is_refused(
    restricted: Api, namespace: str, kind: str, owners: list[Object]
) -> None:
    thing = next(thing for thing in golden(GOLDEN[0]) if thing["kind"] == kind)
    thing["metadata"]["ownerReferences"] = owners
    said = refusal(restricted, namespace, thing)
    assert f"{kind} {thing['metadata']['name']} has no controller owner of kind DPOJob" in said


def _pod(change: Callable[[Object], None]) -> Object:
    thing = child()
    for replica in thing["spec"]["pytorchReplicaSpecs"].values():
        change(replica["template"]["spec"])
    return thing


def _first(change: Callable[[Object], object], where: str = "containers") -> Callable[[Object], None]:
    def changed(pod: Object) -> None:
        if where == "initContainers":
            pod["initContainers"] = [{"name": "side", "image": "s:1", "restartPolicy": "Always"}]
        change(pod[where][0])

    return changed


def _volume(source: Object) -> Callable[[Object], None]:
    return lambda pod: pod["volumes"].append({"name": "more", **source})


VIOLATIONS: dict[str, tuple[Callable[[Object], None], str]] = {
    "a token": (lambda pod: pod.pop("automountServiceAccountToken"), "automountServiceAccountToken"),
    "a token that is asked for": (lambda pod: pod.update(automountServiceAccountToken=True), "automountServiceAccount"),
    "a projected token": (
        _volume({"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}), "trainer.identityAudience",
    ),
    "a host path": (_volume({"hostPath": {"path": "/etc"}}), "hostPath volume that is not in trainer.podPatch: /etc"),
    "the host's network": (lambda pod: pod.update(hostNetwork=True), "hostNetwork"),
    "the host's processes": (lambda pod: pod.update(hostPID=True), "hostPID"),
    "the host's IPC": (lambda pod: pod.update(hostIPC=True), "hostIPC"),
    "privilege": (_first(lambda c: c["securityContext"].update(privileged=True)), "pytorch is privileged"),
    "a capability": (
        _first(lambda c: c["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])), "pytorch adds a capability",
    ),
    "a privileged sidecar": (
        _first(lambda c: c.update(securityContext={"privileged": True}), "initContainers"),
        "init container is privileged",
    ),
    "a sidecar's capability": (
        _first(lambda c: c.update(securityContext={"capabilities": {"add": ["NET_ADMIN"]}}), "initContainers"),
        "init container adds a capability",
    ),
    "another container": (
        lambda pod: pod["containers"].append({"name": "shell", "image": "i"}), "another container than pytorch",
    ),
    "another command": (_first(lambda c: c.update(command=["sh", "-c", "id"])), "not run python -m dpo_trainer launch"),
    "the image's own command": (_first(lambda c: c.pop("command")), "does not run python -m dpo_trainer launch"),
}  # fmt: skip


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_pod_that_is_no_trainer_is_refused_with_the_reason(restricted: Api, namespace: str, name: str) -> None:
    change, said = VIOLATIONS[name]
    assert said in refusal(restricted, namespace, _pod(change))


def test_a_violation_of_the_workers_alone_is_refused(restricted: Api, namespace: str) -> None:
    thing = child()
    replicas = thing["spec"]["pytorchReplicaSpecs"]
    replicas["Worker"] = copy.deepcopy(replicas["Master"])
    assert refusal(restricted, namespace, thing) == ""
    replicas["Worker"]["template"]["spec"]["hostPID"] = True
    assert "hostPID" in refusal(restricted, namespace, thing)


def test_only_children_of_dpojobs_can_be_deleted(restricted: Api, cluster: ControlPlane, namespace: str) -> None:
    foreign, own = child(), child()
    foreign["metadata"] |= {"name": "foreign", "ownerReferences": []}
    for thing in (foreign, own):
        thing["spec"]["runPolicy"]["suspend"] = True
        cluster.admin.create(PYTORCHJOBS, namespace, thing)
    with pytest.raises(ApiError, match="PyTorchJob foreign has no controller owner"):
        restricted.delete(PYTORCHJOBS, namespace, "foreign")
    restricted.delete(PYTORCHJOBS, namespace, own["metadata"]["name"])


def test_nobody_else_is_restricted(restricted: Api, cluster: ControlPlane, namespace: str) -> None:
    assert refusal(cluster.admin, namespace, {"kind": "ConfigMap", "metadata": {"name": "free"}}) == ""
    assert refusal(cluster.admin, namespace, _pod(VIOLATIONS["a host path"][0])) == ""


# -- what the installation's pod patch allows -------------------------------------------------------------------------


def _patched(patch: Object, sidecars: list[Object] | None = None) -> Object:
    """Return a PyTorchJob as the operator creates it with this patch."""

    def change(pod: Object) -> None:
        if sidecars:
            pod["initContainers"] = copy.deepcopy(sidecars)
        pod.update(podpatch.applied({"metadata": {}, "spec": pod}, patch)["spec"])

    return _pod(change)


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_the_pod_patch_is_allowed_and_no_more(
    restricted: Api, cluster: ControlPlane, home: Path, namespace: str, path: Path
) -> None:
    patch = yaml.safe_load(path.read_text())
    own = f"release-{path.stem}"
    made = install(cluster, home, namespace=own, trainer={"podPatch": patch})
    api = cluster.api(f"system:serviceaccount:{own}:{RELEASE}", ["system:masters"])
    wrong = _pod(VIOLATIONS["the host's IPC"][0])
    try:
        eventually(lambda: refusal(api, namespace, wrong), what="the policy of pods is in force")
        assert refusal(api, namespace, _patched(patch)) == ""
        assert refusal(api, namespace, child()) == ""
        for name, (change, said) in VIOLATIONS.items():
            if name != "the host's network" or not patch["spec"].get("hostNetwork"):
                assert said in refusal(api, namespace, _pod(change)), name
        # A job whose own sidecar has the name of the patch's: that one gets another name.
        others = [{"name": c["name"], "image": "s:1"} for c in patch["spec"].get("initContainers", [])]
        assert refusal(api, namespace, _patched(patch, others)) == ""
    finally:
        for resource, name in reversed(made):
            cluster.admin.delete(resource, None, name)
    needs_host = "hostPath" in path.read_text()
    assert bool(refusal(restricted, namespace, _patched(patch))) is needs_host


# -- the sample policies of docs/security.md --------------------------------------------------------------------------

SAMPLES: dict[str, list[tuple[Object, str]]] = {
    "images.yaml": [
        ({"image": "registry.example.com/team/trainer:1"}, ""),
        (
            {"image": "docker.io/anyone/anything:1"},
            "docker.io/anyone/anything:1 is not an image of registry.example.com/",
        ),
        ({"image": None}, ""),
        (
            {"image": None, "podTemplate": {"sidecars": [{"name": "side", "image": "docker.io/x:1"}]}},
            "spec.podTemplate.sidecars: use images of registry.example.com/",
        ),
    ],
    "queue.yaml": [
        ({"runPolicy": {"queueName": "team"}}, ""),
        ({}, "spec.runPolicy.queueName: name a LocalQueue"),
        ({"labels": {"kueue.x-k8s.io/queue-name": "team"}}, ""),
    ],
    "identities.yaml": [
        ({"serviceAccountName": "trainer", "podTemplate": {"priorityClassName": "training"}}, ""),
        ({}, ""),
        ({"serviceAccountName": "admin"}, "spec.serviceAccountName: use one of default, trainer"),
        (
            {"podTemplate": {"priorityClassName": "system-node-critical"}},
            "spec.podTemplate.priorityClassName: use one of training",
        ),
    ],
}


def test_every_sample_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples" / "policies").glob("*")} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_policy_does_what_it_says(cluster: ControlPlane, namespace: str, name: str) -> None:
    made = list(yaml.safe_load_all((ROOT / "examples" / "policies" / name).read_text()))
    # Other tests create jobs meanwhile.
    made[1]["spec"]["matchResources"] = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    }

    def said(spec: Object) -> str:
        own = {key: value for key, value in spec.items() if key != "labels" and value is not None}
        body = manifest("job", **own)
        body["metadata"]["labels"] = spec.get("labels", {})
        if spec.get("image", "") is None:
            del body["spec"]["image"]
        try:
            cluster.admin.call("POST", path_of(DPOJOBS, namespace), body, dryRun="All")
        except ApiError as error:
            return error.message
        return ""

    try:
        for resource, thing in zip((_POLICIES, _BINDINGS), made, strict=True):
            cluster.admin.apply(resource, None, thing)
        refused = next(spec for spec, wanted in SAMPLES[name] if wanted)
        eventually(lambda: said(refused), what="the policy is in force")
        for spec, wanted in SAMPLES[name]:
            assert wanted in said(spec) if wanted else said(spec) == ""
    finally:
        for resource, thing in zip((_BINDINGS, _POLICIES), reversed(made), strict=True):
            cluster.admin.delete(resource, None, thing["metadata"]["name"])
