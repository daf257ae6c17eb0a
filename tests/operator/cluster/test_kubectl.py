"""What kubectl shows of the API, and what the API server says to the examples and their children; no operator runs."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dpo_testing.controlplane import REPOSITORY, ControlPlane
from dpo_testing.jobs import manifest
from dpo_testing.kubeapi import CONFIGMAPS, DPOJOBS, NETWORK_POLICIES, PODS, PYTORCHJOBS, ApiError, Object, path_of

RESOURCES = {"ConfigMap": CONFIGMAPS, "NetworkPolicy": NETWORK_POLICIES, "PyTorchJob": PYTORCHJOBS, "Pod": PODS}


def fields(schema: Object, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield path and description of every field of a schema."""
    if "items" in schema:
        schema = schema["items"]
    for name, inner in schema.get("properties", {}).items():
        yield f"{prefix}.{name}", inner.get("description", "")
        yield from fields(inner, f"{prefix}.{name}")


def ours(schema: Object) -> dict[str, str]:
    """Return the description of every field of a DPOJob that is not any object's, by path."""
    parts = ("spec", "status")
    return {path: text for part in parts for path, text in fields(schema["properties"][part], f"dpojob.{part}")}


def explained(tree: str) -> set[str]:
    """Return the path of every field that ``kubectl explain dpojob --recursive`` shows."""
    found: set[str] = set()
    way: list[tuple[int, str]] = [(-1, "dpojob")]
    for line in tree.splitlines():
        shown = re.fullmatch(r"( *)(\S+)\t<\S+>.*", line)
        if shown is not None:
            while way[-1][0] >= len(shown[1]):
                way.pop()
            way.append((len(shown[1]), f"{way[-1][1]}.{shown[2]}"))
            found.add(way[-1][1])
    return found


def test_explain_knows_every_field(cluster: ControlPlane) -> None:
    definition = cluster.admin.get(
        ("apiextensions.k8s.io/v1", "customresourcedefinitions"), None, "dpojobs.dpo-operator.dev"
    )
    listed = ours(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    assert len(listed) > 150
    assert [path for path, description in listed.items() if not description] == []
    # What kubectl explains is what the API server publishes: the same fields in the same words,
    document = cluster.admin.call("GET", f"/openapi/v3/apis/{DPOJOBS[0]}")
    (published,) = (s for name, s in document["components"]["schemas"].items() if name.endswith(".DPOJob"))
    assert ours(published) == listed
    # each of them at its place in the tree,
    tree = explained(cluster.kubectl("explain", "dpojob", "--recursive").stdout)
    assert {path for path in tree if path.startswith(("dpojob.spec.", "dpojob.status."))} == set(listed)
    # and, for some at every depth, alone.
    for path in [next(iter(listed)), *(path for path in listed if path.endswith((".beta", ".uri", ".reason")))][:8]:
        shown = " ".join(cluster.kubectl("explain", path).stdout.split())
        assert " ".join(listed[path].split())[:60] in shown, path


def test_columns_and_short_names(cluster: ControlPlane, namespace: str) -> None:
    cluster.admin.create(DPOJOBS, namespace, manifest("shown"))
    narrow = cluster.kubectl("get", "dpo", "-n", namespace).stdout.splitlines()[0].split()
    assert narrow == ["NAME", "STATE", "STEP", "ACC", "MARGIN", "RESTARTS", "NODES", "AGE"]
    wide = cluster.kubectl("get", "dpojobs", "-n", namespace, "-o", "wide").stdout.splitlines()[0].split()
    assert wide[len(narrow) :] == ["LOSS", "ETA", "GPUS", "LAYOUT", "QUEUE", "MESSAGE"]


def test_a_typo_is_refused_by_name(cluster: ControlPlane, namespace: str) -> None:
    body = manifest("typo")
    body["spec"]["dpo"] = {"betta": 0.1}
    done = cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=yaml.safe_dump(body), check=False)
    assert done.returncode != 0
    assert 'unknown field "spec.dpo.betta"' in done.stderr


def test_examples_are_admitted(cluster: ControlPlane, namespace: str) -> None:
    # quickstart.yaml and the folder of its parts are for one machine: `dpo run`.
    found = sorted(set(REPOSITORY.glob("examples/*.yaml")) - {REPOSITORY / "examples" / "quickstart.yaml"})
    assert found
    for path in found:
        done = cluster.kubectl("apply", "-n", namespace, "--dry-run=server", "-f", str(path), check=False)
        assert done.returncode == 0, f"{path.name}: {done.stderr}"


def test_children_of_examples_are_admitted(cluster: ControlPlane) -> None:
    """By the strict API server, PyTorchJob's webhook and, as pods, by restricted Pod Security."""
    goldens = sorted(REPOSITORY.glob("tests/golden/child/*.yaml"))
    assert goldens
    accounts = {"default"}
    with cluster.namespace("goldens", {"pod-security.kubernetes.io/enforce": "restricted"}) as namespace:

        def dry_run(thing: Object) -> None:
            path = path_of(RESOURCES[thing["kind"]], namespace)
            cluster.admin.call("POST", path, thing, dryRun="All", fieldValidation="Strict")

        for path in goldens:
            config_map, policy, child = things = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
            assert [thing["kind"] for thing in things] == ["ConfigMap", "NetworkPolicy", "PyTorchJob"], path.name
            pods = [pod_of(child, role) for role in child["spec"]["pytorchReplicaSpecs"]]
            for account in {pod["spec"].get("serviceAccountName", "default") for pod in pods} - accounts:
                cluster.admin.create(("v1", "serviceaccounts"), namespace, {"metadata": {"name": account}})
                accounts.add(account)
            for thing in (config_map, policy, child, *pods):
                try:
                    dry_run(thing)
                except ApiError as error:
                    pytest.fail(f"{thing['kind']} of {path.name}: {error}")

        # Each of the three judges sat: what it alone refuses is refused.
        strange, double, bold = copy.deepcopy(child), copy.deepcopy(child), pod_of(child, "Master")
        strange["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["tolerance"] = []
        double["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] = 2
        bold["spec"]["hostNetwork"] = True
        for thing, words in ((strange, "unknown field"), (double, "admission webhook"), (bold, "PodSecurity")):
            with pytest.raises(ApiError, match=words):
                dry_run(thing)


@pytest.mark.parametrize("golden", sorted(REPOSITORY.glob("tests/golden/pod-patch/*.yaml")), ids=lambda p: p.stem)
def test_children_with_a_pod_patch_are_admitted(cluster: ControlPlane, namespace: str, golden: Path) -> None:
    """By the strict API server, as a PyTorchJob and as pods, in a namespace that is not restricted."""
    child = yaml.safe_load(golden.read_text(encoding="utf-8"))
    for thing in (child, *(pod_of(child, role) for role in child["spec"]["pytorchReplicaSpecs"])):
        path = path_of(RESOURCES[thing["kind"]], namespace)
        cluster.admin.call("POST", path, thing, dryRun="All", fieldValidation="Strict")


def pod_of(child: Object, role: str) -> Object:
    """Return a pod as training-operator makes it of a role's template, but for what it adds itself."""
    template = copy.deepcopy(child["spec"]["pytorchReplicaSpecs"][role]["template"])
    name = f"{child['metadata']['name']}-{role.lower()}-0"
    return {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": name}}
