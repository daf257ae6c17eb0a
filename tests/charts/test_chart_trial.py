"""The real trainer runs the manifest of `helm test` on the model and data that the operator writes for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpo_api.manifest import parse_job
from dpo_api.validation import check
from dpo_testing.chart import RELEASE, pick, render
from dpo_testing.command import Command
from dpo_testing.kubeapi import Object


def job(home: Path, **test: object) -> Object:
    """Return the DPOJob of a release's test."""
    config = pick(render({"test": test}, home=home), "ConfigMap", "-test")
    found: Object = yaml.safe_load(config["data"]["job.yaml"].replace("@TIME@", "1"))
    return found


def test_the_manifest_is_possible_on_a_cluster(home: Path) -> None:
    found = check(parse_job(job(home)).spec, on_cluster=True)
    # Random weights learn nothing in nine steps at a rate that suits a language model.
    assert [(finding.level, finding.field) for finding in found] == [("warning", "spec.training.learningRate")]


def test_a_custom_spec_is_merged_into_it(home: Path) -> None:
    spec = job(home, spec={"image": "i:1", "resources": {"cpu": "2"}}, storage={"claim": "mine"})["spec"]
    assert (spec["image"], spec["resources"]["cpu"], spec["resources"]["memory"]) == ("i:1", "2", "2Gi")
    assert spec["model"]["huggingFace"]["uri"] == "pvc://mine/model/"
    own = {"model": {"huggingFace": {"uri": "s3://m/"}}, "data": {"train": [{"uri": "s3://d"}]}}
    objects = render({"test": {"spec": {**own, "checkpoint": {"uri": "s3://r/"}}}}, home=home)
    assert not [o for o in objects if o["kind"] == "PersistentVolumeClaim" or o["metadata"]["name"].endswith("-data")]
    given = yaml.safe_load(pick(objects, "ConfigMap", "-test")["data"]["job.yaml"])["spec"]
    assert {key: given[key] for key in own} == own


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"imagePullSecrets": [{"name": "pull"}]}, [{"name": "pull"}]),
        ({"imagePullSecrets": [{"name": "pull"}], "test": {"fsGroup": None}}, [{"name": "pull"}]),
        # The operator gives the installation's to every job that names none: the test shows that it does.
        ({"imagePullSecrets": [{"name": "pull"}], "trainer": {"imagePullSecrets": [{"name": "all"}]}}, None),
        ({}, None),
    ],
)
def test_its_pods_can_pull_from_a_private_registry(home: Path, values: Object, named: list[Object] | None) -> None:
    config = pick(render(values, home=home), "ConfigMap", "-test")
    template = yaml.safe_load(config["data"]["job.yaml"])["spec"].get("podTemplate", {})
    assert template.get("imagePullSecrets") == named
    assert template.get("security") == (None if "test" in values else {"fsGroup": 65532})


@pytest.mark.slow
def test_it_learns_what_the_data_says(home: Path, tmp_path: Path) -> None:
    claim = tmp_path / "claims" / f"{RELEASE}-test"
    words = pick(render(home=home), "Pod", "-data")["spec"]["containers"][0]["command"]
    assert words[-1] == "/data"
    made = subprocess.run([sys.executable, *words[1:-1], str(claim)], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(job(home)))
    said = Command(tmp_path)("run", "-f", str(manifest), DPO_PVC_ROOT=str(tmp_path / "claims"))
    assert said.code == 0, said.all
    assert "accuracy 100.0%" in said.all
    assert (claim / "runs" / "1" / "model" / "model.safetensors").exists()
