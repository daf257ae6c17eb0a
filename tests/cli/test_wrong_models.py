"""Wrong model folders: `dpo validate` refuses each without torch, in the words of the trainer that would load it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import DPOError, Outcome
from dpo_api.manifest import load_manifest
from dpo_api.models import read_config
from dpo_testing.cli import PACKAGES, Dpo, World, make_world
from dpo_testing.models import edit_config, load_model, single_process
from dpo_testing.s3server import S3Server
from dpo_testing.training_world import write_model
from dpo_trainer.sources import open_tokenizer

SHARD = "model-00002-of-00003.safetensors"
WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "megatron", "transformers", "dpo_trainer"):
            raise AssertionError(f"dpo validate imports {name}")

sys.meta_path.insert(0, Blocked())
from dpo_cli.__main__ import main
main()
"""


@dataclass(frozen=True)
class Case:
    """What is wrong with the folder, the outcome, and the texts for file, key with value, and fix."""

    name: str
    change: Callable[[Path], object]
    texts: tuple[str, ...]
    outcome: Outcome = Outcome.InvalidModel


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


def key(name: str, value: str, fix: str, **changes: Any) -> Case:
    return Case(name, config(**changes), ("config.json: ", value, fix))


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def sharded(folder: Path) -> None:
    """Cut the weights into three files, as a large model's."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder: Path) -> None:
    sharded(folder)
    (folder / SHARD).unlink()


def index_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def holding(name: str, content: dict[str, Any]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(content))


ORIGINAL = "copy the model's original config.json"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
NEMOTRON = {"model_type": "nemotron", "hidden_act": "relu2"}
STABLELM = {"model_type": "stablelm"}
PHI4_MINI = {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}

CASES = [
    key("dynamic", 'rope_parameters.rope_type is "dynamic"', "remove it if no text exceeds", rope_parameters=DYNAMIC),
    key(
        "dynamic of older files",
        'rope_scaling.rope_type is "dynamic"',
        "remove it if no text exceeds",
        rope_parameters=...,
        rope_scaling={"type": "dynamic", "factor": 4.0},
    ),
    key("awq", 'quantization_config is {"quant_method": "awq"', "use the original model", quantization_config=AWQ),
    key("gptq", 'quantization_config is {"quant_method": "gptq"', "use the original model", quantization_config=GPTQ),
    Case("old awq", holding("quant_config.json", {"w_bit": 4}), ("quant_config.json: quantised weights", "original")),
    Case("old gptq", holding("quantize_config.json", GPTQ), ("quantize_config.json: quantised", "use the original")),
    key("mlx", 'quantization is {"bits": 4', "use the original model", quantization={"bits": 4}),
    key("gelu", 'hidden_act is "gelu"', "use a model with this activation", hidden_act="gelu"),
    key(
        "unknown rope",
        'rope_parameters.rope_type is "spiral"',
        "supported are default, linear, llama3 and yarn",
        rope_parameters={"rope_type": "spiral"},
    ),
    key(
        "rope of no type",
        "rope_parameters.rope_type is 7",
        "supported are default, linear, llama3 and yarn",
        rope_parameters={"rope_type": 7},
    ),
    key("rope without factor", "factor is missing", ORIGINAL, rope_parameters={"rope_type": "linear"}),
    key("llama3 bounds", "high_freq_factor is 4.0: it must be above low_freq", ORIGINAL, rope_parameters=LLAMA3),
    key("part of the head", "partial_rotary_factor is 0.5", "(1.0) is supported", partial_rotary_factor=0.5),
    key("bias on o_proj", "attention_bias is true: a bias on o_proj", "use a model without it", attention_bias=True),
    key("bias in the MLP", "mlp_bias is true: a bias in the MLP", "use a model without it", mlp_bias=True),
    key("experts", "num_local_experts is 8: mixture-of-experts", "use a dense model", num_local_experts=8),
    key("experts of Qwen", "num_experts is 64: mixture-of-experts", "use a dense model", num_experts=64),
    key("experts of DeepSeek", "n_routed_experts is 4", "use a dense model", n_routed_experts=4),
    key("moe family", 'model_type is "mixtral"', "start from a model of one of these families", model_type="mixtral"),
    key("no family", "model_type is null", "start from a model of one of these families", model_type=...),
    key("family of no name", 'model_type is ["llama"]', "start from a model of one", model_type=["llama"]),
    key("bias of Nemotron", "attention_bias is true", "use a model without it", **NEMOTRON, attention_bias=True),
    key("bias of its MLP", "mlp_bias is true", "use a model without it", **NEMOTRON, mlp_bias=True),
    key("gate of Nemotron", 'hidden_act is "silu"', "only relu2 is supported", **{**NEMOTRON, "hidden_act": "silu"}),
    key("parallel", "use_parallel_residual is true", "use a model without it", **STABLELM, use_parallel_residual=True),
    key("norm per head", "qk_layernorm is true", "use a model without it", **STABLELM, qk_layernorm=True),
    key("head size", "head_dim is 16: a head size", "use a model without it", **STABLELM, head_dim=16),
    key(
        "longrope of Phi-4 mini",
        'rope_scaling.rope_type is "longrope"',
        "use a model without longrope",
        rope_parameters=...,
        **PHI4_MINI,
    ),
    *[
        key(f"bias of {name}", "attention_bias is true", "use a model without it", model_type=name, attention_bias=True)
        for name in ("smollm3", "granite")
    ],
    *[
        key(f"MLP bias of {name}", "mlp_bias is true", "use a model without it", model_type=name, mlp_bias=True)
        for name in ("smollm3", "granite")
    ],
    key("rope layers", "no_rope_layers is [1]", ORIGINAL, model_type="smollm3", no_rope_layers=[1]),
    key(
        "caps",
        'model_type is "gemma2": its caps of scores and logits',
        "start from a model of one",
        model_type="gemma2",
    ),
    key("images", 'model_type is "gemma3": it reads images', "start from a model of one", model_type="gemma3"),
    key("bias of OLMo 2", "attention_bias is true", "use a model without it", model_type="olmo2", attention_bias=True),
    *[
        key(f"Gemma 3, {name}", f"{name} is true", "use a model without it", model_type="gemma3_text", **{name: True})
        for name in (
            "attention_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "use_bidirectional_attention",
        )
    ],
    key("odd head", "head_dim is 15: it must be even", "use a model with an even head size", head_dim=15),
    key("heads", "hidden_size is 50: not divisible by", "set head_dim", hidden_size=50, head_dim=...),
    key("groups", "num_key_value_heads is 3: it must divide", ORIGINAL, num_key_value_heads=3),
    key("classifier", 'architectures is ["LlamaForS', "use the base model", architectures=["LlamaForSequence"]),
    key("architectures", 'architectures is "Llama', "it must be a list", architectures="LlamaForCausalLM"),
    key("float8", 'dtype is "float8_e4m3fn"', "use the original model", dtype="float8_e4m3fn"),
    key("no layers", "num_hidden_layers is 0", ORIGINAL, num_hidden_layers=0),
    key("no width", "intermediate_size is missing", ORIGINAL, intermediate_size=...),
    key("epsilon", "rms_norm_eps is NaN", "it must be a positive number", rms_norm_eps=float("nan")),
    key("layer types", "layer_types is ", "it must name full_attention", **QWEN2, layer_types=["chunked"] * 3),
    Case("not JSON", lambda f: (f / "config.json").write_text("{"), ("config.json: not valid JSON", "copy the file")),
    Case("a list", lambda f: (f / "config.json").write_text("[]"), ("config.json: must hold a JSON object", "copy")),
    Case(
        "missing shard",
        lose_a_shard,
        (f"{SHARD}: model.safetensors.index.json names this file, but it is missing", "copy it there"),
    ),
    Case("index not JSON", index_of("{"), ("model.safetensors.index.json: not valid JSON", "copy the file again")),
    Case(
        "index of other folders",
        index_of('{"weight_map": {"x": "../y.safetensors"}}'),
        ("weight_map must map tensors to file names beside it", "copy the file again"),
    ),
    Case("empty index", index_of('{"weight_map": {}}'), ("weight_map must map tensors", "copy the file again")),
    Case("pickled", pickled, ("pytorch_model.bin: pickled weights can run code", "safe_serialization=True")),
    Case(
        "no weights",
        remove("model.safetensors"),
        ("holds neither model.safetensors nor model.safetensors.index.json", "is it a Hugging Face model folder?"),
        Outcome.NotFound,
    ),
    Case(
        "no tokenizer",
        remove("tokenizer.json"),
        ("holds no tokenizer (tokenizer.json, ", "set spec.tokenizer.uri to a folder that has one"),
        Outcome.NotFound,
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with single_process():
        yield


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Case → the manifest of a job with that model; "right" is a job that can run."""
    root = tmp_path_factory.mktemp("models")
    original = write_model(root / "original")
    manifests = {}
    for case in [Case("right", lambda _folder: None, ()), Case("right shards", sharded, ()), *CASES]:
        folder = root / case.name.replace(" ", "-")
        folder.mkdir()
        world = make_world(folder)
        shutil.rmtree(folder / "model")
        shutil.copytree(original, folder / "model")
        case.change(folder / "model")
        manifests[case.name] = world.write()
    return manifests


@pytest.fixture(scope="module")
def verdicts(jobs: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Case → what one `dpo validate -o json` of all jobs says, in a process that cannot import the trainer."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PACKAGES)}
    command = [sys.executable, "-c", WITHOUT_TORCH, "validate", *jobs.values(), "-o", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == Outcome.InvalidModel.exit_code, done.stderr
    return dict(zip(jobs, json.loads(done.stdout), strict=True))


def trainer_says(manifest: str) -> DPOError | None:
    """What the trainer's own loading of the model and its tokenizer ends with."""
    spec = load_manifest(Path(manifest)).spec
    assert spec.model.hugging_face is not None
    try:
        load_model(Path(spec.model.hugging_face.uri))
        open_tokenizer(spec)
    except DPOError as error:
        return error
    return None


@pytest.mark.parametrize("name", ["right", "right shards"])
def test_a_right_model_is_right_to_both(name: str, jobs: dict[str, str], verdicts: dict[str, dict[str, Any]]) -> None:
    assert (verdicts[name]["valid"], verdicts[name]["findings"]) == (True, [])
    assert trainer_says(jobs[name]) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_refuse_it_in_the_same_words(
    case: Case, jobs: dict[str, str], verdicts: dict[str, dict[str, Any]], dpo: Dpo
) -> None:
    error = trainer_says(jobs[case.name])
    assert error is not None
    for text in case.texts:
        assert text in str(error)
    assert error.outcome is case.outcome
    verdict = verdicts[case.name]
    assert [finding["message"] for finding in verdict["findings"]] == [str(error)]
    assert verdict["findings"][0]["field"] == "spec.model.huggingFace.uri"
    assert verdict["outcome"] == case.outcome.name
    said = dpo("validate", jobs[case.name])
    assert said.code == case.outcome.exit_code
    assert f"error    spec.model.huggingFace.uri: {error}" in said.out


@pytest.mark.parametrize("name", ["dynamic", "missing shard", "no tokenizer"])
def test_the_same_for_a_model_in_s3(
    name: str, world: World, dpo: Dpo, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dpo_store import open_store
    from dpo_trainer.formats.huggingface import Checkpoint

    case = next(case for case in CASES if case.name == name)
    for variable, value in s3.environment().items():
        monkeypatch.setenv(variable, value)
    bucket = name.replace(" ", "-")
    s3.make_bucket(bucket)
    uri = f"s3://{bucket}/model"
    folder = write_model(tmp_path / "wrong")
    case.change(folder)
    store = open_store()
    store.upload_tree(folder, f"{uri}/")
    world.spec["model"]["huggingFace"]["uri"] = uri
    manifest = world.write()
    with pytest.raises(DPOError) as caught:  # noqa: PT012 - which of the three fails depends on the case
        model = read_config(store, uri)
        Checkpoint.open(store, uri).check(model)
        open_tokenizer(load_manifest(Path(manifest)).spec)
    assert str(caught.value).startswith(uri)
    said = dpo("validate", manifest)
    assert said.code == case.outcome.exit_code
    assert f"error    spec.model.huggingFace.uri: {caught.value}" in said.out
