"""Manifests keep their meaning through YAML, JSON and an API server's numbers, and released ones load for ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_api.crd import custom_resource_definition
from dpo_api.findings import ManifestError
from dpo_api.manifest import DPOJob, load_documents, load_manifest, load_manifests, parse_job
from dpo_api.spec import DPOJobSpec, Loss, StorageAccess
from dpo_api.status import DPOJobStatus
from dpo_api.validation import ModelFacts, check, errors
from dpo_testing.crd_schema import problems, unknown_fields
from dpo_testing.go_json import go_json, go_number
from dpo_testing.manifests import manifest, spec

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
GOLDEN = sorted((ROOT / "tests/golden/api").glob("v*/*.yaml"))
SCHEMA = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
LLAMA = ModelFacts(
    layers=32, heads=32, kv_heads=8, hidden=4096, ffn=14336, vocab=128256, max_positions=8192, family="llama"
)


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def jobs(path: Path) -> list[DPOJob]:
    return load_manifests(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_an_example_is_right(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#"), "an example tells what it is for"
    for job in jobs(path):
        sizes = [2000] * len(job.spec.data.validation)
        local = path.name == "quickstart.yaml"  # every other example runs on a cluster too
        findings = check(job.spec, LLAMA, 61_135, validation_pairs=sizes, on_cluster=not local)
        assert [str(f) for f in findings if f.level != "note"] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_the_api_server_takes_an_example(path: Path) -> None:
    for document in load_documents(path):
        assert problems(SCHEMA, document.value) == []
        assert unknown_fields(SCHEMA, document.value) == []


def test_the_examples_that_are_promised_exist() -> None:
    names = "llama3-8b-lora llama3-8b-full mistral-ipo rpo-rewards sft nemo-tutorial storage-pvc storage-pod-identity"
    assert {path.stem for path in EXAMPLES} >= {*names.split(), "storage-per-source"}


@pytest.mark.parametrize("path", [*EXAMPLES, *GOLDEN], ids=named)
def test_the_meaning_survives_yaml_json_and_go(path: Path) -> None:
    documents = load_documents(path)
    for document, job in zip(documents, jobs(path), strict=True):
        through_go = go_json(document.value)
        stored = json.loads(through_go)
        assert parse_job(stored) == job
        # What the operator hands to the trainer, and what `kubectl get -o yaml | dpo validate -` reads.
        assert load_manifest(job.to_json()) == job
        assert load_manifest(go_json(job.to_dict())) == job
        assert load_manifest(yaml.safe_dump(stored, sort_keys=True)) == job
        assert set(paths(job.to_dict())) == set(paths(document.value)), "nothing is added, nothing is lost"


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from paths(child, f"{prefix}.{key}")
    elif isinstance(value, list):
        for child in value:
            yield from paths(child, f"{prefix}[]")
    yield prefix


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (0.1, "0.1"),
        (9e-7, "9e-7"),
        (9e-6, "0.000009"),
        (1e-6, "0.000001"),
        (1.5e-8, "1.5e-8"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (-0.5, "-0.5"),
        (0.0, "0"),
    ],
)
def test_go_s_numbers(value: float, text: str) -> None:
    """Checked against Go's encoding/json."""
    assert go_number(value) == text
    assert float(text) == value


@pytest.mark.parametrize("path", GOLDEN, ids=named)
def test_a_released_manifest_loads_for_ever(path: Path) -> None:
    for job in jobs(path):
        assert job.spec.data.train


def test_a_stored_spec_may_hold_a_field_that_was_removed_as_it_changed_nothing() -> None:
    """0.1.0 had transformerEngine.attention, and refused true."""
    now = manifest({"spec.transformerEngine": {"fp8": "hybrid"}})
    before = manifest({"spec.transformerEngine": {"fp8": "hybrid", "attention": False}})
    assert parse_job(before, stored=True) == parse_job(now)
    assert load_manifest(json.dumps(before), stored=True) == parse_job(now)
    for value, stored in ((False, False), (True, True), (True, False)):
        before["spec"]["transformerEngine"]["attention"] = value
        with pytest.raises(ManifestError, match=r"spec\.transformerEngine\.attention: unknown field; attention is the"):
            parse_job(before, stored=stored)


def test_the_complete_manifest_means_what_it_says() -> None:
    made = load_manifest(ROOT / "tests/golden/api/v1alpha1/complete.yaml").spec
    assert errors(check(made, on_cluster=True)) == []
    assert made.training.learning_rate == 9e-7
    assert made.training.betas == (0.9, 0.95)
    assert made.training.validation_interval == "12.5%"
    assert made.training.limit_validation_batches == 10
    assert made.resources.extended == {"rdma/ib": "1", "vpc.amazonaws.com/efa": "4"}
    assert made.checkpoint.async_save is False
    assert made.reference.cache_uri == "s3://cache/reference/"
    assert made.data.train[0].weight == 1


def schema_paths(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, child in schema.get("properties", {}).items():
        inner = child.get("items", child)
        path = f"{prefix}.{name}"
        yield path
        yield from schema_paths(inner, path + ("[]" if "items" in child else ""))


def test_the_released_manifests_name_every_field_of_the_spec() -> None:
    named_fields = {p for path in GOLDEN for document in load_documents(path) for p in paths(document.value["spec"])}
    access = {"endpoint", "region", "forcePathStyle", "credentialsSecretRef", "caBundle"}

    def shared(path: str) -> bool:
        """A source's own storage section has the fields of spec.storage."""
        head, mark, tail = path.partition(".storage.")
        return bool(mark) and head != "" and tail.split(".")[0] in access

    missing = {p for p in schema_paths(SCHEMA["properties"]["spec"]) if p not in named_fields and not shared(p)}
    assert missing == set(), "add new fields to tests/golden/api: every released field loads for ever"


def test_a_released_status_loads_for_ever() -> None:
    text = (ROOT / "tests/golden/api/v1alpha1/status.json").read_text()
    value = json.loads(text)
    status = DPOJobStatus.model_validate(value)
    assert json.loads(status.model_dump_json(by_alias=True, exclude_unset=True)) == value
    schema = SCHEMA["properties"]["status"]
    assert problems(schema, value) == []
    assert unknown_fields(schema, value) == []
    assert set(schema_paths(schema)) <= set(paths(value)), "every field of the status is in the released one"
    value["somethingNew"] = 1
    assert DPOJobStatus.model_validate(value) == status


DEFAULTS: dict[str, Any] = {
    # dpo-semantics.md, "Defaults" and "Decisions"
    "dpo.loss": Loss("dpo"),
    "dpo.losses": None,
    "dpo.label_smoothing": 0.0,
    "dpo.simpo_gamma": None,
    "dpo.ld_alpha": None,
    "dpo.beta": 0.1,
    "dpo.preference_weight": 1.0,
    "dpo.sft_weight": 0.0,
    "dpo.average_log_probs": False,
    "dpo.sft_average_log_probs": None,
    "dpo.gt_reward_scale": 1.0,
    "dpo.default_chosen_reward": 1.0,
    "dpo.default_rejected_reward": 0.0,
    "lora": None,
    "training.global_batch_size": 64,
    "training.micro_batch_size": None,
    "training.packing.enabled": True,
    "training.packing.max_tokens": None,
    "training.prefix_sharing": True,
    "training.epochs": 1,
    "training.max_steps": None,
    "training.drop_last": True,
    "training.learning_rate": 9e-6,
    "training.schedule.warmup_steps": 10,
    "training.schedule.constant_steps": None,
    "training.schedule.min_learning_rate": None,
    "training.weight_decay": 0.1,
    "training.betas": (0.9, 0.98),
    "training.eps": 1e-8,
    "training.gradient_clip": 1.0,
    "training.validation_interval": "10%",
    "training.validate_at_start": True,
    "training.limit_train_batches": None,
    "training.limit_validation_batches": None,
    "training.early_stopping": None,
    "training.seed": 1234,
    "training.precision": "bf16",
    "training.activation_recomputation": "none",
    "training.max_run_seconds": None,
    "training.deterministic": False,
    "data.max_length": 4096,
    "data.over_length": "drop",
    "data.pairs": "bestWorst",
    "data.preference_margin": False,
    "data.on_invalid": "error",
    "data.boundary": "strict",
    "data.add_bos": "auto",
    "data.append_eos": False,
    "parallelism.tensor": 1,
    "parallelism.distributed_optimizer": True,
    "checkpoint.every_steps": 100,
    "checkpoint.keep": 3,
    "checkpoint.resume": True,
    "checkpoint.async_save": False,
    "checkpoint.monitor": None,
    "output.from_checkpoint": "last",
    "output.formats": ("huggingFace",),
    "output.merge": True,
    "output.dtype": None,
    "run_policy.max_restarts": 3,
    "run_policy.suspend": False,
}


@pytest.mark.parametrize(("path", "default"), DEFAULTS.items(), ids=list(DEFAULTS))
def test_defaults_are_a_contract(path: str, default: Any) -> None:
    made: Any = spec()
    for name in path.split("."):
        made = getattr(made, name)
    assert made == default
    assert type(made) is type(default)


def test_early_stopping_s_defaults() -> None:
    early = spec({"training.earlyStopping": {}}).training.early_stopping
    assert early is not None
    assert (early.monitor, early.patience, early.min_delta) == (None, 3, 0.0)


def test_lora_s_defaults() -> None:
    lora = spec({"lora": {}}).lora
    assert lora is not None
    assert (lora.continue_adapter, lora.rank, lora.alpha, lora.dropout) == (False, 32, None, 0.0)
    assert lora.dropout_position == "pre"
    assert (lora.target_modules, lora.layers, lora.column_init, lora.row_init) == (
        ("attention_qkv",),
        None,
        "xavier",
        "zero",
    )


def test_names_of_python_are_not_names_of_json() -> None:
    assert DPOJobSpec.model_fields["run_policy"].alias == "runPolicy"
    assert spec({"training.learningRate": 1e-6}).model_dump(by_alias=True)["training"]["learningRate"] == 1e-6


def test_keys_are_never_shown_to_another_endpoint() -> None:
    common = spec(
        {"storage": {"endpoint": "https://a", "region": "r", "credentialsSecretRef": {"name": "ours"}}}
    ).storage

    def name(own: StorageAccess | None) -> str | None:
        reference = common.access(own).credentials_secret_ref
        return reference.name if reference else None

    assert name(None) == "ours"
    assert name(StorageAccess(region="x")) == "ours"
    assert name(StorageAccess(endpoint="https://a")) == "ours"
    assert name(StorageAccess(endpoint="https://b")) is None
    other = common.access(StorageAccess(endpoint="https://b", force_path_style=False))
    assert (other.region, other.force_path_style) == ("r", False)
