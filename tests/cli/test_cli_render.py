"""`dpo render`: exactly what the operator creates, offline, and its refusals."""

from __future__ import annotations

from pathlib import Path

import yaml

from dpo_api.manifest import load_manifest
from dpo_operator.config import Settings
from dpo_testing.cli import Dpo

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LORA = str(EXAMPLES / "llama3-8b-lora.yaml")


def test_prints_the_objects(dpo: Dpo) -> None:
    said = dpo("render", "-f", LORA)
    assert said.code == 0
    config_map, policy, child = yaml.safe_load_all(said.out)
    assert (config_map["kind"], policy["kind"], child["kind"]) == ("ConfigMap", "NetworkPolicy", "PyTorchJob")
    assert child["metadata"]["name"] == "llama3-8b-helpful-1"
    container = child["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    assert container["image"] == config_map["data"]["image"] == Settings().trainer_image
    mounted = child["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["volumes"][0]
    assert mounted["configMap"]["name"] == config_map["metadata"]["name"]
    assert "&" not in said.out, "no YAML anchors"


def test_values_image_and_attempt(dpo: Dpo) -> None:
    options = (
        "--set",
        "resources.nodes=3",
        "--set",
        "runPolicy.queueName=q",
        "--image",
        "my/trainer:2",
        "--attempt",
        "4",
    )
    said = dpo("render", "-f", LORA, *options)
    config_map, _, child = yaml.safe_load_all(said.out)
    assert config_map["data"]["image"] == "my/trainer:2"
    assert child["metadata"]["name"] == "llama3-8b-helpful-4"
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert child["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2


def test_what_would_be_rejected_is_not_rendered(dpo: Dpo) -> None:
    said = dpo("render", "-f", LORA, "--set", "checkpoint.uri=runs/x")
    assert (said.code, said.out) == (2, "")
    assert "spec.checkpoint.uri: runs/x is not mounted in the pods" in said.err


def test_warnings_go_to_standard_error(dpo: Dpo) -> None:
    said = dpo("render", "-f", LORA, "--set", "dpo.beta=50")
    assert said.code == 0
    assert "spec.dpo.beta" in said.err
    assert "far outside the usual" not in said.out


def test_many_jobs_of_one_file(dpo: Dpo, tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(Path(LORA).read_text() + "\n---\n" + (EXAMPLES / "sft.yaml").read_text())
    kinds = [thing["kind"] for thing in yaml.safe_load_all(dpo("render", "-f", str(file)).out)]
    assert kinds == ["ConfigMap", "NetworkPolicy", "PyTorchJob"] * 2


def test_a_label_of_the_job_names_its_queue(dpo: Dpo, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    document = yaml.safe_load(load_manifest(LORA).to_json())
    document["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team-b"}
    file.write_text(yaml.safe_dump(document))
    _, _, child = yaml.safe_load_all(dpo("render", "-f", str(file)).out)
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-b"
