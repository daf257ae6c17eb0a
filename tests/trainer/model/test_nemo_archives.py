"""Models from .nemo archives: their logits are those of the same arithmetic in plain torch, whatever the layout."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.inputs import Model
from dpo_api.models import read_config
from dpo_api.models.folder import Files
from dpo_api.models.megatron.presented import PresentedModel
from dpo_api.models.start import start_model
from dpo_store import join_uri
from dpo_testing.models import local_store, plain_pack, single_process, token_stream
from dpo_testing.nemo_archives import (
    GPT_2B,
    LLAMA,
    NEMOTRON,
    Tiny,
    content,
    divided,
    logits,
    replace,
    saved,
    state,
    unpack,
    write,
)
from dpo_trainer.formats.export import export
from dpo_trainer.formats.huggingface import load_weights, open_weights
from dpo_trainer.formats.megatron import MegatronWeights
from dpo_trainer.model import forward
from dpo_trainer.model.build import build_model

TOLERANCE = 1e-5
TOKENS = token_stream(40, vocabulary=GPT_2B.vocab)
MODELS = {
    "gpt-2b": GPT_2B,
    "llama": LLAMA,
    "tied": replace(LLAMA, tied=True),
    "nemotron": NEMOTRON,
    "layernorm": replace(GPT_2B, norm="layernorm"),
    "1 + w of an RMS norm": replace(LLAMA, norm="rmsnorm1p"),
    "nemotron of plain norms": replace(NEMOTRON, norm="layernorm"),
    "biases of q, k and v": replace(GPT_2B, qkv_bias=True),
    "interpolated": replace(GPT_2B, more={"seq_len_interpolation_factor": 4.0}),
}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=list(MODELS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return MODELS[request.param]


def source(path: Path) -> tuple[Files, str]:
    return start_model(local_store(), Model.model_validate({"nemo": {"uri": str(path)}}))


def loaded(path: Path) -> tuple[Any, str]:
    """Our model from an archive, and its fingerprint."""
    files, uri = source(path)
    model = build_model(read_config(files, uri))
    return model, load_weights(model, files, uri).fingerprint


@torch.no_grad()
def expected(tiny: Tiny) -> Tensor:
    found = logits(tiny, state(tiny), TOKENS)
    assert found.std() >= 1
    return found


@torch.no_grad()
def ours(path: Path) -> Tensor:
    return forward.logits(loaded(path)[0], plain_pack([TOKENS]))


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_logits(tiny: Tiny, tmp_path: Path) -> None:
    assert apart(ours(write(tmp_path / "m.nemo", content(tiny, state(tiny)))), expected(tiny)) <= TOLERANCE


@torch.no_grad()
def test_the_export_is_the_same_model_in_transformers(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write(tmp_path / "m.nemo", content(tiny, state(tiny)))
    export(loaded(path)[0], *source(path), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert apart(model(TOKENS[None]).logits[0], expected(tiny)) <= TOLERANCE


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("name", ["gpt-2b", "tied", "nemotron"])
def test_a_model_that_ranks_saved_is_the_same(name: str, tensor: int, pipeline: int, tmp_path: Path) -> None:
    tiny = MODELS[name]
    whole = write(tmp_path / "whole.nemo", content(tiny, state(tiny)))
    parts = write(tmp_path / "m.nemo", content(tiny, state(tiny), tensor=tensor, pipeline=pipeline))
    assert loaded(parts)[1] == loaded(whole)[1]


@pytest.mark.parametrize("form", ["no ./", "folder", "gzip", "under model", "bf16"])
def test_other_forms_of_an_archive(form: str, tmp_path: Path) -> None:
    tiny, weights = GPT_2B, state(GPT_2B)
    if form == "bf16":
        weights = {name: value.bfloat16() for name, value in weights.items()}
    members = content(tiny, weights)
    if form == "under model":
        config = members["model_config.yaml"]
        members["model_config.yaml"] = b"model:\n" + b"".join(b"  " + line for line in config.splitlines(keepends=True))
    path = tmp_path / "m.nemo"
    if form == "folder":
        unpack(path, members)
    else:
        write(path, members, prefix="" if form == "no ./" else "./", compressed=form == "gzip")
    assert apart(ours(path), logits(tiny, weights, TOKENS)) <= TOLERANCE


def test_a_compressed_archive_is_decompressed_once_on_a_node(tmp_path: Path) -> None:
    path = write(tmp_path / "m.nemo", content(GPT_2B, state(GPT_2B)), compressed=True)
    assert apart(ours(path), expected(GPT_2B)) <= TOLERANCE
    (copy,) = (found for found in (tmp_path / "cache" / "archives").iterdir() if found.suffix != ".lock")
    before = copy.stat().st_ino
    assert apart(ours(path), expected(GPT_2B)) <= TOLERANCE
    assert [found.stat().st_ino for found in copy.parent.iterdir() if found.suffix != ".lock"] == [before]
    files, uri = source(path)
    config, here = read_config(files, uri), open_weights(files, uri)
    described, name = here.describe(), "model.embed_tokens.weight"
    there, _ = source(path)
    assert isinstance(there, PresentedModel)
    read = here.read(name)
    shutil.rmtree(tmp_path / "cache")  # another node has no copy yet
    assert torch.equal(MegatronWeights.known(there, config, described).read(name), read)


def test_the_file_may_name_its_parameters_as_megatron_core_does(tmp_path: Path) -> None:
    renamed = {}
    for name, value in state(GPT_2B).items():
        new = name.replace("model.language_model.encoder", "model.module.decoder").replace("language_model.", "")
        for old, core in (
            ("post_attention_layernorm.", "mlp.linear_fc1.layer_norm_"),
            ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
            ("query_key_value", "linear_qkv"),
            ("self_attention.dense", "self_attention.linear_proj"),
            ("dense_h_to_4h", "linear_fc1"),
            ("dense_4h_to_h", "linear_fc2"),
        ):
            new = new.replace(old, core)
        renamed[new] = value
    assert "model.module.decoder.layers.1.mlp.linear_fc1.layer_norm_bias" in renamed
    members = content(replace(GPT_2B, more={"mcore_gpt": True}), state(GPT_2B))
    members["model_weights.ckpt"] = saved(renamed)
    path = write(tmp_path / "m.nemo", members)
    assert apart(ours(path), expected(GPT_2B)) <= TOLERANCE


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_oldest_order_of_queries_keys_and_values(tensor: int, tmp_path: Path) -> None:
    tiny, old = replace(LLAMA, more={"megatron_legacy": True}), {}
    d = tiny.hidden // tiny.heads
    whole = divided(LLAMA, state(LLAMA), tensor, 1)
    for (rank, _), part in whole.items():
        for name, value in part.items():
            if "query_key_value" in name:  # [heads, 3, d] → [3, heads, d], in each part
                part[name] = value.view(-1, 3, d, tiny.hidden).transpose(0, 1).reshape(value.shape)
        old[f"mp_rank_{rank:02d}/model_weights.ckpt" if tensor > 1 else "model_weights.ckpt"] = saved(part)
    path = write(tmp_path / "m.nemo", {**content(tiny, state(LLAMA), tensor=tensor), **old})
    assert apart(ours(path), expected(LLAMA)) <= TOLERANCE


def test_gate_and_up_as_two_matrices(tmp_path: Path) -> None:
    tiny, weights = replace(GPT_2B, more={"activation": "swiglu"}), state(GPT_2B)
    apart_of = {}
    for name, value in weights.items():
        if "dense_h_to_4h" in name:
            gate, up = value.chunk(2)
            apart_of |= {name: gate.clone(), name.replace("dense_h_to_4h", "dense_h_to_4h_2"): up.clone()}
        else:
            apart_of[name] = value
    members = {**content(tiny, weights), "model_weights.ckpt": saved(apart_of)}
    assert apart(ours(write(tmp_path / "m.nemo", members)), expected(GPT_2B)) <= TOLERANCE


def test_norms_of_bf16_are_shifted_in_fp32(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = {name: value.bfloat16() for name, value in state(GPT_2B).items()}
    path = write(tmp_path / "m.nemo", content(GPT_2B, weights))
    export(loaded(path)[0], *source(path), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    stored = weights["model.language_model.encoder.layers.1.input_layernorm.weight"]
    assert torch.equal(found["model.layers.1.input_layernorm.weight"], stored.float() + 1)
    assert found["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_config_json_of_the_export(tmp_path: Path) -> None:
    files, uri = source(write(tmp_path / "m.nemo", content(GPT_2B, state(GPT_2B))))
    found = json.loads(files.read(join_uri(uri, "config.json")))
    assert found["architectures"] == ["StableLmForCausalLM"]
    assert found["partial_rotary_factor"] == found["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert found["max_position_embeddings"] == GPT_2B.positions
    assert (found["dtype"], found["use_qkv_bias"], found["tie_word_embeddings"]) == ("float32", False, False)


def test_the_tokenizer(tmp_path: Path) -> None:
    members = content(GPT_2B, state(GPT_2B))
    files, uri = source(write(tmp_path / "m.nemo", members))
    model = next(data for name, data in members.items() if name.endswith("256k.model"))
    assert files.children(uri) == ["config.json", "tokenizer.model"]
    assert files.read(join_uri(uri, "tokenizer.model")) == model
    with pytest.raises(NotFoundError):
        files.read(join_uri(uri, "tokenizer.json"))
    path = {"library": "sentencepiece", "model": "/path/of/its/author/spm.model"}
    moved = {**members, **content(replace(GPT_2B, more={"tokenizer": path}), state(GPT_2B)), "spm.model": b"this one"}
    files, uri = source(write(tmp_path / "moved.nemo", moved))
    assert files.read(join_uri(uri, "tokenizer.model")) == b"this one"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"position_embedding_type": "learned_absolute"},
            r'position_embedding_type is "learned_absolute": only "rope"',
        ),
        ({"activation": "gelu"}, 'activation is "gelu": supported are fast-swiglu, swiglu, squared-relu'),
        ({"bias": True}, "bias is true: only false is supported"),
        ({"normalization": "low_precision"}, "normalization is .*supported are layernorm, layernorm1p, rmsnorm"),
        ({"num_moe_experts": 8}, "num_moe_experts is 8: remove it"),
        ({"window_size": [7, 3]}, r"window_size is \[7, 3\]: it must be \[tokens, 0\]"),
        ({"num_layers": None}, "num_layers is missing; copy the model's original model_config.yaml"),
        ({"qk_layernorm": True}, "no family combines layernorm1p and swiglu, qk_layernorm"),
        ({"normalization": "rmsnorm"}, "rotary_percentage is 0.5, which the family llama does not have"),
        ({"num_query_groups": 3}, "num_key_value_heads is 3: it must divide"),
    ],
)
def test_settings_that_no_family_computes(keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    files, uri = source(write(tmp_path / "m.nemo", content(replace(GPT_2B, more=keys), state(GPT_2B))))
    with pytest.raises(InvalidModelError, match=says):
        read_config(files, uri)


def test_ranks_that_are_missing(tmp_path: Path) -> None:
    members = content(GPT_2B, state(GPT_2B), tensor=2, pipeline=2)
    del members["tp_rank_01_pp_rank_001/model_weights.ckpt"]
    with pytest.raises(InvalidModelError, match="holds the weights of 3 ranks, and 2 x 2 ranks saved them"):
        loaded(write(tmp_path / "m.nemo", members))
