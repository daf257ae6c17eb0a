"""The chart's values: each described, each known to the schema, and a wrong one refused by name."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dpo_operator.runtime.options import Options, _parser
from dpo_testing.chart import CHART, COMBINATIONS, REPOSITORY, HelmError, helm, render

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    found = importlib.util.spec_from_file_location("hack_chart", REPOSITORY / "hack" / "chart.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["hack_chart"] = module
    found.loader.exec_module(module)
    return module


def test_what_is_generated_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "hack/chart.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_lint_finds_nothing(home: Path) -> None:
    said = helm("lint", "--strict", str(CHART), home=home)
    assert [line for line in said.splitlines() if line.startswith(("[WARNING]", "[ERROR]"))] == []


def test_every_value_is_described_once(generator: ModuleType) -> None:
    rows = list(generator.values((CHART / "values.yaml").read_text()))
    paths = [row.path for row in rows]
    assert len(paths) == len(set(paths)) > 60
    assert all(row.text.endswith((".", "`.")) and row.section for row in rows), "a description is a sentence"
    for path in _leaves(VALUES):
        assert any(path == known or path.startswith(f"{known}.") for known in paths), path


def test_a_value_without_a_comment_is_an_error(generator: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"values.yaml:4: a\.c has no comment"):
        list(generator.values("a:\n  # Text.\n  b: {}\n  c: 1\n"))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _objects(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield prefix, schema
    for name, inner in schema.get("properties", {}).items():
        if isinstance(inner, dict) and "properties" in inner:
            yield from _objects(inner, f"{prefix}.{name}" if prefix else name)


def test_schema_and_values_name_the_same() -> None:
    for path, schema in _objects(SCHEMA):
        assert schema["additionalProperties"] is False, path
        here: Any = VALUES
        for key in path.split(".") if path else ():
            here = here[key]
        known = set(schema["properties"])
        # Helm gives a chart that is part of another one the key `global`; `claims` is Kubernetes' own.
        assert known - set(here) <= {"global", "claims"}, path
        assert set(here) <= known, path


def test_settings_are_the_flags_without_their_own_value(home: Path) -> None:
    flags = {option[2:] for action in _parser({})._actions for option in action.option_strings if option[:2] == "--"}
    env = {v["name"] for v in _container(home)["env"]}
    own = {name.removeprefix("DPO_OPERATOR_").lower().replace("_", "-") for name in env}
    assert own < flags
    fixed = {"port", "address", "kubeconfig", "version", "selfcheck", "help"}
    assert set(SCHEMA["properties"]["settings"]["propertyNames"]["enum"]) == flags - own - fixed
    assert Options().port == _container(home)["ports"][0]["containerPort"]


def _container(home: Path) -> dict[str, Any]:
    objects = render(home=home)
    deployment = next(o for o in objects if o["kind"] == "Deployment")
    container: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_are_rendered(home: Path, name: str) -> None:
    objects = render(COMBINATIONS[name], home=home)
    names = [(o["apiVersion"], o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(names) == len(set(names)), "two objects of one name"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"crds": {"kep": True}}, "additional properties 'kep' not allowed"),
        ({"crd": {}}, "additional properties 'crd' not allowed"),
        ({"trainer": {"image": {"tag": "a b"}}}, "/trainer/image/tag"),
        ({"image": {"digest": "sha256:12"}}, "/image/digest"),
        ({"watchNamespaces": "team-a"}, "/watchNamespaces"),
        ({"watchNamespaces": ["Team_A"]}, "/watchNamespaces/0"),
        ({"monitoring": {"enabled": True}}, "must be one of 'auto', 'always', 'never'"),
        ({"monitoring": {"interval": "30"}}, "/monitoring/interval"),
        ({"monitoring": {"rules": {"alerts": {"DPOJobLost": {}}}}}, "additional properties 'DPOJobLost' not allowed"),
        ({"monitoring": {"rules": {"alerts": {"DPOJobFailed": {"seconds": 3}}}}}, "'seconds' not allowed"),
        ({"monitoring": {"rules": {"alerts": {"DPOJobFailed": {"for": "soon"}}}}}, "/alerts/DPOJobFailed/for"),
        ({"settings": {"worker": 3}}, "invalid propertyName 'worker'"),
        ({"settings": {"trainer-image": "x"}}, "invalid propertyName 'trainer-image'"),
        ({"settings": {"scrape-by": "api-proxy"}}, "/settings/scrape-by"),
        ({"trainer": {"imagePullSecrets": ["pull"]}}, "/trainer/imagePullSecrets/0"),
        ({"trainingOperator": {"initContainer": {"runAsUser": 0}}}, "/trainingOperator/initContainer/runAsUser"),
        ({"trainer": {"env": {"A": "x,y=1"}}}, 'trainer.env.A: "x,y=1" contains a comma followed by NAME='),
        ({"nodeSelector": {"gpu": True}}, "/nodeSelector/gpu"),
        ({"trainer": {"annotations": {"a": True}}}, "/trainer/annotations/a"),
        ({"trainer": {"tolerations": [{"effect": "No"}]}}, "/trainer/tolerations/0/effect"),
        ({"trainer": {"runtimeClassName": "A_b"}}, "/trainer/runtimeClassName"),
        ({"defaults": {"ttlSecondsAfterFinished": "30d"}}, "/defaults/ttlSecondsAfterFinished"),
        ({"runAsUser": 0}, "/runAsUser"),
        ({"admissionPolicy": {"enabled": True}}, "must be one of 'auto', 'always', 'never'"),
        ({"networkPolicy": {"trainer": {"namespaces": []}}}, "additional properties 'namespaces' not allowed"),
        ({"metrics": {"authentication": {"enabled": True}}}, "metrics.authentication.enabled: needs metrics.tls"),
        ({"defaults": {"s3": {"endpoint": "https://user:key@s3"}}}, "/defaults/s3/endpoint"),
    ],
)
def test_a_wrong_value_is_refused_by_name(home: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmError) as refused:
        render(values, home=home)
    assert said in str(refused.value)


def test_an_old_cluster_is_refused(home: Path) -> None:
    with pytest.raises(HelmError, match="requires kubeVersion"):
        helm("template", "x", str(CHART), "--kube-version=1.28.0", home=home)
    helm("template", "x", str(CHART), "--kube-version=1.31.2-gke.1", home=home)
