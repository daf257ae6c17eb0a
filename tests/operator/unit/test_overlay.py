"""What a podTemplate may not do: each refusal, by field, and the nearest thing that is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_api.manifest import parse_job
from dpo_api.validation import check, errors
from dpo_testing.simcluster import manifest

Object = dict[str, Any]

VOLUME = {"name": "extra", "emptyDir": {}}
SIDECAR = {"name": "proxy", "image": "proxy:1"}


def refused(template: Object, **spec: Any) -> list[str]:
    found = errors(check(parse_job(manifest(podTemplate=template, **spec)).spec, on_cluster=True))
    return [finding.field.removeprefix("spec.podTemplate.") for finding in found]


REFUSED: list[tuple[str, Object, str]] = [
    ("own label", {"labels": {"dpo-operator.dev/job": "x"}}, "labels"),
    ("controller's label", {"labels": {"training.kubeflow.org/job-name": "x"}}, "labels"),
    ("queue's label", {"labels": {"kueue.x-k8s.io/queue-name": "x"}}, "labels"),
    ("a workload's label", {"labels": {"kueue.x-k8s.io/podset-required-topology": "x"}}, "labels"),
    ("queue's annotation", {"annotations": {"kueue.x-k8s.io/managed": "x"}}, "annotations"),
    ("own annotation", {"annotations": {"dpo-operator.dev/x": "x"}}, "annotations"),
    (
        "apparmor",
        {"annotations": {"container.apparmor.security.beta.kubernetes.io/pytorch": "unconfined"}},
        "annotations",
    ),
    ("seccomp", {"annotations": {"seccomp.security.alpha.kubernetes.io/pod": "unconfined"}}, "annotations"),
    ("torchrun's env", {"env": [{"name": "PET_NNODES", "value": "1"}]}, "env[0].name"),
    ("torch's env", {"env": [{"name": "WORLD_SIZE", "value": "1"}]}, "env[0].name"),
    ("own env", {"env": [{"name": "DPO_CACHE_DIR", "value": "/x"}]}, "env[0].name"),
    ("home", {"env": [{"name": "HOME", "value": "/x"}]}, "env[0].name"),
    ("preload", {"env": [{"name": "LD_PRELOAD", "value": "/x"}]}, "env[0].name"),
    ("python path", {"env": [{"name": "PYTHONPATH", "value": "/x"}]}, "env[0].name"),
    ("keys twice", {"env": [{"name": "AWS_ACCESS_KEY_ID", "value": "x"}]}, "env[0].name"),
    ("env twice", {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "env[1].name"),
    ("unknown source", {"env": [{"name": "A", "valueFrom": {"vault": {}}}]}, "env[0].valueFrom"),
    ("two sources", {"env": [{"name": "A", "valueFrom": {"fieldRef": {}, "secretKeyRef": {}}}]}, "env[0].valueFrom"),
    ("host path", {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "volumes[0]"),
    ("nfs", {"volumes": [{"name": "a", "nfs": {}}]}, "volumes[0]"),
    ("no source", {"volumes": [{"name": "a"}]}, "volumes[0]"),
    ("two sources of a volume", {"volumes": [{"name": "a", "emptyDir": {}, "secret": {}}]}, "volumes[0]"),
    ("no name", {"volumes": [{"emptyDir": {}}]}, "volumes[0].name"),
    ("name twice", {"volumes": [VOLUME, VOLUME]}, "volumes[1].name"),
    ("own volume", {"volumes": [{"name": "spec", "emptyDir": {}}]}, "volumes[0].name"),
    ("own claim", {"volumes": [{"name": "claim-0", "emptyDir": {}}]}, "volumes[0].name"),
    (
        "token",
        {"volumes": [{"name": "a", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]},
        "volumes[0].projected.sources[0].serviceAccountToken",
    ),
    ("mount of nothing", {"volumeMounts": [{"name": "a", "mountPath": "/a"}]}, "volumeMounts[0].name"),
    ("mount of ours", {"volumeMounts": [{"name": "scratch", "mountPath": "/a"}]}, "volumeMounts[0].name"),
    *(
        (f"mount at {path}", {"volumes": [VOLUME], "volumeMounts": [{"name": "extra", "mountPath": path}]}, place)
        for path, place in [
            ("/", "volumeMounts[0].mountPath"),
            ("/tmp", "volumeMounts[0].mountPath"),
            ("/etc/dpo/spec", "volumeMounts[0].mountPath"),
            ("/dev/shm/", "volumeMounts[0].mountPath"),
            ("/mnt/claims/x", "volumeMounts[0].mountPath"),
            ("/var/run/secrets/kubernetes.io/serviceaccount", "volumeMounts[0].mountPath"),
        ]
    ),
    ("sidecar without name", {"sidecars": [{"image": "a"}]}, "sidecars[0].name"),
    ("trainer's name", {"sidecars": [{"name": "pytorch", "image": "a"}]}, "sidecars[0].name"),
    ("init container's name", {"sidecars": [{"name": "init-pytorch", "image": "a"}]}, "sidecars[0].name"),
    ("sidecar twice", {"sidecars": [SIDECAR, SIDECAR]}, "sidecars[1].name"),
    ("typo", {"sidecars": [{**SIDECAR, "comand": []}]}, "sidecars[0].comand"),
    ("plain init container", {"sidecars": [{**SIDECAR, "restartPolicy": "Never"}]}, "sidecars[0].restartPolicy"),
    (
        "privileged",
        {"sidecars": [{**SIDECAR, "securityContext": {"privileged": True}}]},
        "sidecars[0].securityContext.privileged",
    ),
    (
        "capabilities",
        {"sidecars": [{**SIDECAR, "securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}}]},
        "sidecars[0].securityContext.capabilities",
    ),
    (
        "root",
        {"sidecars": [{**SIDECAR, "securityContext": {"runAsNonRoot": False}}]},
        "sidecars[0].securityContext.runAsNonRoot",
    ),
    ("host port", {"sidecars": [{**SIDECAR, "ports": [{"hostPort": 80}]}]}, "sidecars[0].ports[0].hostPort"),
    (
        "sidecar reads our secrets",
        {"sidecars": [{**SIDECAR, "volumeMounts": [{"name": "credentials-0", "mountPath": "/a"}]}]},
        "sidecars[0].volumeMounts[0].name",
    ),
    ("affinity's typo", {"affinity": {"nodeAfinity": {}}}, "affinity.nodeAfinity"),
    ("affinity's form", {"affinity": {"nodeAffinity": []}}, "affinity.nodeAffinity"),
    (
        "wishes' form",
        {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": {}}}},
        "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution",
    ),
]


@pytest.mark.parametrize(("template", "field"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(template: Object, field: str) -> None:
    assert refused(template) == [field]


def test_plain_text_keys_are_refused() -> None:
    secret = {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "hush"}]}
    assert refused(secret, storage={}) == ["env[0].value"]
    by_reference = {"secretKeyRef": {"name": "s", "key": "k"}}
    assert refused({"env": [{"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": by_reference}]}, storage={}) == []


@pytest.mark.parametrize(
    "template",
    [
        {"labels": {"team": "a", "app.kubernetes.io/name": "x"}},
        {"annotations": {"prometheus.io/scrape": "true"}},
        {"annotations": {"kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/topology-rack"}},
        {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "E", "value": ""}]},
        {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]},
        {"volumes": [VOLUME], "volumeMounts": [{"name": "extra", "mountPath": "/tmp/extra"}]},
        {"volumes": [{"name": "a", "projected": {"sources": [{"secret": {"name": "x"}}]}}]},
        {"sidecars": [{**SIDECAR, "restartPolicy": "Always", "securityContext": {"runAsUser": 7}}]},
        {
            "volumes": [VOLUME],
            "sidecars": [{**SIDECAR, "volumeMounts": [{"name": "extra", "mountPath": "/x"}], "ports": [{"name": "p"}]}],
        },
        {"affinity": {"podAntiAffinity": {}, "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}}},
    ],
)
def test_allowed(template: Object) -> None:
    assert refused(template) == []


@pytest.mark.parametrize(
    "field",
    ["securityContext", "command", "serviceAccountName", "automountServiceAccountToken", "hostNetwork", "containers"],
)
def test_the_overlay_is_a_closed_list(field: str) -> None:
    from dpo_api.findings import ManifestError

    with pytest.raises(ManifestError, match=rf"podTemplate\.{field}: unknown field"):
        parse_job(manifest(podTemplate={field: {}}))
