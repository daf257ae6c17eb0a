"""The installation's pod patch: what it may set, how it is merged, and what it can never take over."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_api.findings import ManifestError
from dpo_api.manifest import load_manifest, parse_job
from dpo_operator.backend import podpatch
from dpo_operator.backend.pytorchjob import Identity, build_child
from dpo_operator.config import Settings
from dpo_operator.runtime.podflags import load_patch
from dpo_testing.simcluster import manifest

Object = dict[str, Any]

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "pod-patch"
PATCHES = sorted((ROOT / "examples" / "pod-patches").glob("*.yaml"))
IDENTITY = Identity("job", "team", "uid-1", created=1_800_000_000)
SIDECAR = {"name": "proxy", "image": "proxy:1"}
LIBRARIES = {"name": "libraries", "hostPath": {"path": "/opt/lib"}}
DAEMON = {
    "name": "daemon",
    "image": "daemon:1",
    "restartPolicy": "Always",
    "securityContext": {"privileged": True},
    "volumeMounts": [{"name": "libraries", "mountPath": "/lib/node"}],
}


def templates(patch: Object, **spec: Any) -> list[Object]:
    """Return the pod templates of a job of two nodes, patched."""
    assert list(podpatch.check(patch)) == []
    settings = Settings(trainer_pod_patch=copy.deepcopy(patch))
    job = parse_job(manifest(resources={"nodes": 2, "gpusPerNode": 8}, **spec))
    body = build_child(job, IDENTITY, 1, "trainer:1", settings, ())
    assert settings.trainer_pod_patch == patch, "the next pod is patched with the same"
    return [replica["template"] for replica in body["spec"]["pytorchReplicaSpecs"].values()]


def trainer(template: Object) -> Object:
    (found,) = template["spec"]["containers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_patched_children(patch: Path) -> None:
    """After a wanted change: UPDATE_GOLDEN=1 python -m pytest tests/operator/unit/test_pod_patch.py; read the diff."""
    job = load_manifest(ROOT / "examples" / "llama3-70b-full.yaml")
    settings = Settings(trainer_pod_patch=load_patch(patch))
    identity = Identity(job.metadata.name, job.metadata.namespace, "", created=1_800_000_000)
    text = yaml.safe_dump(
        build_child(job, identity, 1, "registry.example.com/dpo/trainer:1", settings), sort_keys=False
    )
    golden = GOLDEN / patch.name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"{golden} differs; see the docstring"


def test_every_golden_has_its_patch() -> None:
    assert PATCHES
    assert {path.name for path in GOLDEN.glob("*.yaml")} == {path.name for path in PATCHES}


def test_lists_are_merged_by_their_keys() -> None:
    # The command has the digest of the spec, so both jobs have the same one.
    own = {"env": [{"name": "NCCL_DEBUG", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}
    (before, _), (master, worker) = (
        templates({}, podTemplate=own),
        templates(
            {
                "metadata": {"labels": {"fabric": "x"}, "annotations": {"a": "b"}},
                "spec": {
                    "hostNetwork": True,
                    "dnsPolicy": "ClusterFirstWithHostNet",
                    "tolerations": [{"key": "fabric", "operator": "Exists"}],
                    "nodeSelector": {"fabric": "x"},
                    "securityContext": {"runAsUser": 0},
                    "volumes": [LIBRARIES],
                    "containers": [
                        {
                            "name": "pytorch",
                            "env": [
                                {"name": "NCCL_DEBUG", "value": "WARN"},
                                {"name": "LD_LIBRARY_PATH", "value": "/lib"},
                            ],
                            "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                            "volumeMounts": [{"name": "libraries", "mountPath": "/opt"}],
                            "resources": {"limits": {"rdma/ib": 1}, "claims": [{"name": "imex"}]},
                        }
                    ],
                },
            },
            podTemplate=own,
        ),
    )
    for template, old in ((master, before), (worker, None)):
        assert template["metadata"]["labels"]["fabric"] == "x"
        assert template["metadata"]["labels"]["dpo-operator.dev/job"] == "job"
        assert template["metadata"]["annotations"] == {"a": "b"}
        spec, container = template["spec"], trainer(template)
        assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
        assert spec["tolerations"][-1] == {"key": "fabric", "operator": "Exists"}
        assert len(spec["tolerations"]) == 3, "the operator's own are kept"
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["volumes"][-1] == LIBRARIES
        env = [(e["name"], e.get("value")) for e in container["env"]]
        assert len(dict(env)) == len(env)
        assert (dict(env)["NCCL_DEBUG"], dict(env)["LD_LIBRARY_PATH"]) == ("WARN", "/lib")
        assert next(e for e in container["env"] if e["name"] == "NCCL_DEBUG") == {"name": "NCCL_DEBUG", "value": "WARN"}
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/ib": 1}
        assert container["resources"]["claims"] == [{"name": "imex"}]
        if old is not None:
            assert container["volumeMounts"][:-1] == trainer(old)["volumeMounts"]
            for name in ("command", "image", "terminationMessagePath", "livenessProbe"):
                assert container[name] == trainer(old)[name]


def test_a_mount_of_the_same_path_is_the_installations() -> None:
    own = {"volumes": [{"name": "mine", "emptyDir": {}}], "volumeMounts": [{"name": "mine", "mountPath": "/opt/lib"}]}
    patch: Object = {"spec": {"volumes": [LIBRARIES], "containers": [{"name": "pytorch", "volumeMounts": [{}]}]}}
    patch["spec"]["containers"][0]["volumeMounts"] = [{"name": "libraries", "mountPath": "/opt/lib", "readOnly": True}]
    for template in templates(patch, podTemplate=own):
        mounts = {mount["mountPath"]: mount for mount in trainer(template)["volumeMounts"]}
        assert mounts["/opt/lib"] == {"name": "libraries", "mountPath": "/opt/lib", "readOnly": True}


def test_a_job_cannot_take_over_a_volume_or_a_container_of_the_patch() -> None:
    """Its volume stays its own, wherever it mounts it, and its command never gets the rights of the patch's sidecar."""
    own = {
        "volumes": [{"name": "libraries", "emptyDir": {}}],
        "volumeMounts": [{"name": "libraries", "mountPath": "/anywhere"}],
        "sidecars": [{"name": "daemon", "image": "own:1", "command": ["sh"]}],
    }
    patch = {
        "spec": {
            "volumes": [LIBRARIES],
            "initContainers": [DAEMON],
            "containers": [{"name": "pytorch", "volumeMounts": [{"name": "libraries", "mountPath": "/opt"}]}],
        }
    }
    for template in templates(patch, podTemplate=own):
        spec = template["spec"]
        sources = {volume["name"]: volume for volume in spec["volumes"]}
        assert len(sources) == len(spec["volumes"])
        assert sources["libraries"] == {"name": "libraries", "emptyDir": {}}
        mounts = {mount["mountPath"]: mount["name"] for mount in trainer(template)["volumeMounts"]}
        assert mounts["/anywhere"] == "libraries"
        assert sources[mounts["/opt"]]["hostPath"] == {"path": "/opt/lib"}
        daemon, sidecar = spec["initContainers"]
        assert daemon["name"] != sidecar["name"] == "daemon"
        assert (daemon["image"], sidecar["image"], sidecar["command"]) == ("daemon:1", "own:1", ["sh"])
        assert daemon["volumeMounts"][0]["name"] == mounts["/opt"]
        assert "command" not in daemon
        assert sidecar["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in sidecar["securityContext"]


def of(container: Object) -> Object:
    return {"spec": {"containers": [{"name": "pytorch", **container}]}}


REFUSED: list[tuple[str, Any, str]] = [
    ("a text", "hostNetwork", ""),
    ("another part", {"status": {}}, "status"),
    ("a list", {"spec": []}, "spec"),
    ("name", {"metadata": {"name": "x"}}, "metadata.name"),
    ("owner", {"metadata": {"ownerReferences": []}}, "metadata.ownerReferences"),
    ("own label", {"metadata": {"labels": {"dpo-operator.dev/job": "x"}}}, "metadata.labels"),
    ("manager", {"metadata": {"labels": {"app.kubernetes.io/managed-by": "x"}}}, "metadata.labels"),
    ("a number", {"metadata": {"annotations": {"a": 1}}}, "metadata.annotations"),
    ("token", {"spec": {"automountServiceAccountToken": True}}, "spec.automountServiceAccountToken"),
    ("account", {"spec": {"serviceAccountName": "x"}}, "spec.serviceAccountName"),
    ("restarts", {"spec": {"restartPolicy": "Always"}}, "spec.restartPolicy"),
    ("affinity", {"spec": {"affinity": {}}}, "spec.affinity"),
    ("typo", {"spec": {"hostnetwork": True}}, "spec.hostnetwork"),
    ("form", {"spec": {"volumes": {"name": "a"}}}, "spec.volumes"),
    ("directive", {"spec": {"$setElementOrder/containers": []}}, "spec.$setElementOrder/containers"),
    ("deletion", {"spec": {"volumes": [{"name": "a", "$patch": "delete"}]}}, "spec.volumes[0].$patch"),
    ("no name", {"spec": {"volumes": [{"emptyDir": {}}]}}, "spec.volumes[0].name"),
    ("own volume", {"spec": {"volumes": [{"name": "shm", "emptyDir": {}}]}}, "spec.volumes[0].name"),
    ("twice", {"spec": {"volumes": [LIBRARIES, LIBRARIES]}}, "spec.volumes[1].name"),
    ("no source", {"spec": {"volumes": [{"name": "a"}]}}, "spec.volumes[0]"),
    (
        "token of the cluster",
        {"spec": {"volumes": [{"name": "a", "projected": {"sources": [{"serviceAccountToken": {}}]}}]}},
        "spec.volumes[0].projected.sources[0].serviceAccountToken",
    ),
    ("command", of({"command": ["sh"]}), "spec.containers[0].command"),
    ("arguments", of({"args": []}), "spec.containers[0].args"),
    ("image", of({"image": "x"}), "spec.containers[0].image"),
    ("probe", of({"livenessProbe": {}}), "spec.containers[0].livenessProbe"),
    ("own variable", of({"env": [{"name": "DPO_CACHE_DIR", "value": "x"}]}), "spec.containers[0].env[0].name"),
    ("torchrun's", of({"env": [{"name": "PET_NNODES", "value": "1"}]}), "spec.containers[0].env[0].name"),
    ("python path", of({"env": [{"name": "PYTHONPATH", "value": "/x"}]}), "spec.containers[0].env[0].name"),
    ("mount", of({"volumeMounts": [{"name": "a", "mountPath": "/a"}]}), "spec.containers[0].volumeMounts[0].name"),
    (
        "own path",
        of({"volumeMounts": [{"name": "scratch", "mountPath": "/etc/dpo/spec/"}]}),
        "spec.containers[0].volumeMounts[0].mountPath",
    ),
    (
        "privileged",
        of({"securityContext": {"privileged": True}}),
        "spec.containers[0].securityContext.allowPrivilegeEscalation",
    ),
    ("another container", {"spec": {"containers": [SIDECAR]}}, "spec.containers[0].name"),
    ("two sidecars", {"spec": {"initContainers": [SIDECAR, SIDECAR]}}, "spec.initContainers[1].name"),
    (
        "trainer as sidecar",
        {"spec": {"initContainers": [{**SIDECAR, "name": "pytorch"}]}},
        "spec.initContainers[0].name",
    ),
    ("no image", {"spec": {"initContainers": [{"name": "a"}]}}, "spec.initContainers[0].image"),
    ("a sidecar's typo", {"spec": {"initContainers": [{**SIDECAR, "mounts": []}]}}, "spec.initContainers[0].mounts"),
    ("host's DNS", {"spec": {"hostNetwork": True}}, "spec.dnsPolicy"),
]


@pytest.mark.parametrize(("patch", "field"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(patch: Any, field: str) -> None:
    assert [finding.field for finding in podpatch.check(patch)] == [field]


def test_an_error_names_file_line_and_field(tmp_path: Path) -> None:
    file = tmp_path / "patch.yaml"
    file.write_text("spec:\n  containers:\n    - name: pytorch\n      image: other\n")
    with pytest.raises(ManifestError, match=r"patch\.yaml:4: spec\.containers\[0\]\.image: may not be set") as refused:
        load_patch(file)
    assert "securityContext" in str(refused.value), "it lists what may be set"


@pytest.mark.parametrize(("text", "said"), [("a: [", "YAML: "), ("spec: {}\n---\nspec: {}\n", "holds 2 documents")])
def test_a_file_that_is_no_patch(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "patch.yaml"
    file.write_text(text)
    with pytest.raises(ManifestError, match=said):
        load_patch(file)


def test_an_empty_file_is_no_patch(tmp_path: Path) -> None:
    file = tmp_path / "patch.yaml"
    file.write_text("# nothing\n")
    assert load_patch(file) == {}
