"""What kubectl shows of the API, without an operator: explanations, columns, short names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from dpo_testing.controlplane import REPOSITORY, ControlPlane
from dpo_testing.jobs import manifest
from dpo_testing.kubeapi import DPOJOBS


def fields(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield path and description of every field of a schema."""
    if "items" in schema:
        schema = schema["items"]
    for name, inner in schema.get("properties", {}).items():
        yield f"{prefix}.{name}", inner.get("description", "")
        yield from fields(inner, f"{prefix}.{name}")


def test_explain_knows_every_field(cluster: ControlPlane) -> None:
    definition = cluster.admin.get(
        ("apiextensions.k8s.io/v1", "customresourcedefinitions"), None, "dpojobs.dpo-operator.dev"
    )
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    listed = [item for part in ("spec", "status") for item in fields(schema["properties"][part], f"dpojob.{part}")]
    assert len(listed) > 150
    assert [path for path, description in listed if not description] == []
    # kubectl prints what the API server publishes: a few at every depth show that the two agree.
    for path, description in [listed[0], *(item for item in listed if item[0].endswith((".beta", ".uri", ".reason")))][
        :8
    ]:
        shown = " ".join(cluster.kubectl("explain", path).stdout.split())
        assert " ".join(description.split())[:60] in shown, path
    tree = cluster.kubectl("explain", "dpojob", "--recursive").stdout
    for path, _ in listed:
        assert path.rpartition(".")[2] in tree, path


def test_columns_and_short_names(cluster: ControlPlane, namespace: str) -> None:
    cluster.admin.create(DPOJOBS, namespace, manifest("shown"))
    narrow = cluster.kubectl("get", "dpo", "-n", namespace).stdout.splitlines()[0].split()
    assert narrow == ["NAME", "STATE", "STEP", "ACC", "MARGIN", "RESTARTS", "NODES", "AGE"]
    wide = cluster.kubectl("get", "dpojobs", "-n", namespace, "-o", "wide").stdout.splitlines()[0].split()
    assert wide[len(narrow) :] == ["LOSS", "ETA", "GPUS", "QUEUE", "MESSAGE"]


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
