"""Which forms of the model a run leaves, and whose tokenizer lies beside it."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dpo_api.errors import InvalidSpecError
from dpo_testing.corpora import llama_tokenizer
from dpo_testing.models import edit_config, local_store
from dpo_testing.runs import merged, run_here
from dpo_testing.s3server import S3Server, need, s3_server
from dpo_testing.training_world import make
from dpo_trainer.convert.command import open_model

pytestmark = pytest.mark.slow

LORA = {"rank": 2}
WHOLE, ADAPTER = {"config.json", "model.safetensors"}, {"adapter"}


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    return merged(make(tmp_path, pairs=4, validation=1), {"training": {"maxSteps": 1}, "checkpoint": None})


@pytest.mark.parametrize(
    ("lora", "output", "written", "missing"),
    [
        (None, {}, WHOLE, ADAPTER),
        (LORA, {}, WHOLE | ADAPTER, set()),
        (LORA, {"merge": False}, ADAPTER, WHOLE),
        (LORA, {"formats": ["huggingFace"]}, WHOLE, ADAPTER),
        (LORA, {"formats": ["peft"]}, ADAPTER, WHOLE),
        (LORA, {"formats": ["peft", "huggingFace"], "merge": False}, ADAPTER, WHOLE),
    ],
)
def test_the_forms_that_are_asked_for_and_no_other(
    lora: dict[str, Any] | None,
    output: dict[str, Any],
    written: set[str],
    missing: set[str],
    spec: dict[str, Any],
    tmp_path: Path,
) -> None:
    run_here(merged(spec, {"lora": lora, "output": output}), tmp_path / "out")
    found = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert written <= found
    assert not missing & found


def test_megatron_and_nemo_are_made_from_the_folder(spec: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "out" / "model"
    for stale in ("megatron", "model.nemo.parts"):
        (model / stale).mkdir(parents=True)
        (model / stale / "dpo-convert.json").write_text("{}")
    run_here(merged(spec, {"output": {"formats": ["huggingFace", "megatron", "nemo"]}}), tmp_path / "out")
    whole = open_model(local_store(), str(model))
    assert torch.equal(
        whole.tensor("model.norm.weight"), saved(model / "megatron" / "release", "decoder.final_layernorm.weight")
    )
    with tarfile.open(model / "model.nemo") as archive:
        archive.extractall(tmp_path / "nemo", filter="data")
    assert torch.equal(
        whole.tensor("model.norm.weight"),
        saved(tmp_path / "nemo" / "model_weights", "model.decoder.final_layernorm.weight"),
    )
    assert not (model / "model.nemo.parts").exists()


def saved(checkpoint: Path, key: str) -> Tensor:
    """One tensor of a distributed checkpoint, as torch reads it."""
    reader = torch.distributed.checkpoint.FileSystemReader(checkpoint)
    found = reader.read_metadata().state_dict_metadata[key]
    assert isinstance(found, TensorStorageMetadata)
    state = {key: torch.empty(found.size, dtype=found.properties.dtype)}
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state[key]


def test_a_format_that_cannot_say_the_model_is_refused_before_training(spec: dict[str, Any], tmp_path: Path) -> None:
    edit_config(
        Path(spec["model"]["huggingFace"]["uri"]),
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 1.5},
    )
    with pytest.raises(InvalidSpecError, match=r"spec.output.formats: Megatron-LM has no argument for rope_scaling"):
        run_here(merged(spec, {"output": {"formats": ["huggingFace", "megatron"]}}), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_an_export_leaves_no_weights_of_an_earlier_one(spec: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model of two runs"
    (model / "adapter").mkdir(parents=True)
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter/adapter_model.safetensors"]
    for name in [*old, "README.md"]:
        (model / name).write_text("old")
    run_here(merged(spec, {"output": {"uri": str(model)}}), tmp_path / "out")
    assert [name for name in old if (model / name).exists()] == []
    assert (model / "README.md").read_text() == "old"
    assert (model / "model.safetensors").stat().st_size > 1000


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    need("versitygw")
    with s3_server() as server:
        for name, value in server.environment().items():
            if name != "AWS_ENDPOINT_URL":
                monkeypatch.setenv(name, value)
        yield server


@pytest.mark.parametrize("uri", ["s3://tokenizers/tiny/", "s3://tokenizers/tiny/tokenizer.json"])
def test_a_tokenizer_of_its_own_from_another_store_leaves_with_the_model(
    uri: str, spec: dict[str, Any], s3: S3Server, tmp_path: Path
) -> None:
    """Its endpoint is named in its own section only; the uri is a folder or one file."""
    s3.make_bucket("tokenizers")
    other = llama_tokenizer(tmp_path / "other", 300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        s3.client().upload_file(str(other / name), "tokenizers", f"tiny/{name}")
    tokenizer = {"uri": uri, "storage": {"endpoint": s3.endpoint}}
    run_here(merged(spec, {"tokenizer": tokenizer}), tmp_path / "out")
    got = (tmp_path / "out" / "model" / "tokenizer.json").read_bytes()
    assert got == (other / "tokenizer.json").read_bytes()
    assert got != (tmp_path / "model" / "tokenizer.json").read_bytes()
