"""A family is one row: a made-up one is read, built, loaded, exported and adapted without any other change."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_api.errors import InvalidModelError
from dpo_api.models import FAMILIES, Family, TensorNames, read_config
from dpo_api.spec import Lora
from dpo_testing.models import (
    edit_config,
    load_model,
    local_store,
    plain_pack,
    reference_model,
    save_folder,
    single_process,
    token_stream,
)
from dpo_trainer.formats.export import export
from dpo_trainer.formats.peft import export_adapter
from dpo_trainer.model.forward import logits
from dpo_trainer.model.lora import attach_lora

TOY = Family(
    "toy",
    qkv_bias=True,
    refused={"toy_bias": "a bias on the toy"},
    defaults={"num_key_value_heads": 2},
    tensors=TensorNames(
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        head="output",
        layers="transformer.h",
        attention_norm="ln_1",
        qkv=("attn.query", "attn.key", "attn.value"),
        attention_output="attn.out",
        mlp_norm="ln_2",
        gate_up=("ffn.w1", "ffn.w3"),
        down="ffn.w2",
    ),
)
# Qwen2 is Llama with biases on q, k and v: its weights under the toy's names are a toy model.
RENAMED = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "lm_head": "output",
    "model.layers": "transformer.h",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.o_proj": "attn.out",
    "mlp.gate_proj": "ffn.w1",
    "mlp.up_proj": "ffn.w3",
    "mlp.down_proj": "ffn.w2",
}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", TOY)


def renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def reference() -> Any:
    return reference_model("qwen2")


@pytest.fixture
def folder(reference: Any, tmp_path: Path) -> Path:
    folder = save_folder(reference, tmp_path / "toy")
    tensors = {renamed(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    assert "transformer.h.2.attn.query.bias" in tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, model_type="toy", architectures=["ToyForCausalLM"], num_key_value_heads=...)
    return folder


@torch.no_grad()
def test_its_logits_are_those_of_the_model_with_other_names(reference: Any, folder: Path) -> None:
    tokens = token_stream(23)
    difference = logits(load_model(folder), plain_pack([tokens])) - reference(tokens[None]).logits[0]
    assert difference.abs().max() <= 1e-5


def test_its_round_trip_is_bit_exact(folder: Path, tmp_path: Path) -> None:
    export(load_model(folder), local_store(), str(folder), tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_its_adapter_carries_its_names(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    lora = Lora.model_validate({"rank": 4, "targetModules": ["all"], "layers": [1]})
    attach_lora(model, lora, seed=0)
    export_adapter(model, lora, str(folder), tmp_path / "adapter")
    found = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    layers = ("attn.query", "attn.key", "attn.value", "attn.out", "ffn.w1", "ffn.w3", "ffn.w2")
    assert found == {f"base_model.model.transformer.h.1.{name}" for name in layers}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["query", "key", "value", "out", "w1", "w3", "w2"]
    assert config["layers_pattern"] == "h"


def test_its_mistakes_are_named(folder: Path) -> None:
    edit_config(folder, toy_bias=True)
    with pytest.raises(InvalidModelError, match=r"toy_bias is true: a bias on the toy is not supported"):
        read_config(local_store(), str(folder))
    edit_config(folder, toy_bias=..., model_type="other")
    with pytest.raises(InvalidModelError, match=r'model_type is "other": supported are llama, .*, toy; start from'):
        read_config(local_store(), str(folder))
