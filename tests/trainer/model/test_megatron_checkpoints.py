"""Distributed checkpoints of Megatron-Core: the same logits as in plain torch, for every writer and form."""

import json
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.inputs import Model
from dpo_api.models import ModelConfig, read_config
from dpo_api.models.start import check_weights, start_model
from dpo_testing.megatron_folders import (
    arguments,
    core,
    nemo_members,
    prefixed,
    stacked,
    torch_dist,
    torch_dist_of_ranks,
    zarr,
)
from dpo_testing.models import (
    load_model,
    local_store,
    plain_pack,
    reference_model,
    save_folder,
    single_process,
    token_stream,
)
from dpo_testing.nemo_archives import GPT_2B, LLAMA, NEMOTRON, Tiny, logits, replace, saved, state, write
from dpo_trainer.formats.huggingface import load_weights
from dpo_trainer.model import forward
from dpo_trainer.model.build import build_model

TOLERANCE = 1e-5
TOKENS = token_stream(40, vocabulary=GPT_2B.vocab)
MODELS = {"gpt-2b": GPT_2B, "llama": LLAMA, "tied": replace(LLAMA, tied=True), "nemotron": NEMOTRON}
COMMON = "common_state/shard_0_1"


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


def loaded(path: Path, kind: str = "megatron", **fields: Any) -> tuple[Any, str]:
    """Our model from a checkpoint, and its fingerprint."""
    files, uri = start_model(local_store(), Model.model_validate({kind: {"uri": str(path), **fields}}))
    check_weights(files, uri)
    model = build_model(read_config(files, uri))
    return model, load_weights(model, files, uri).fingerprint


@torch.no_grad()
def apart(
    path: Path, tiny: Tiny, weights: dict[str, Tensor] | None = None, kind: str = "megatron", **fields: Any
) -> float:
    expected = logits(tiny, weights or state(tiny), TOKENS)
    assert expected.std() >= 1
    found = forward.logits(loaded(path, kind, **fields)[0], plain_pack([TOKENS]))
    return float((found - expected).abs().max())


def common(tiny: Tiny, **changes: Any) -> dict[str, Any]:
    return {COMMON: [{"args": arguments(tiny, **changes), "checkpoint_version": 3.0, "iteration": 7}]}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("layers", ["stacked", "numbered"])
def test_keys_of_every_writer(name: str, prefix: str, layers: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    tensors = core(state(tiny))
    tensors = prefixed(stacked(tensors, tiny.layers) if layers == "stacked" else tensors, prefix)
    assert apart(torch_dist(tmp_path / "c", tensors, common(tiny)), tiny) <= TOLERANCE


def test_the_common_values_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = torch_dist(tmp_path / "c", stacked(core(state(GPT_2B)), GPT_2B.layers))
    (folder / "common.pt").write_bytes(saved({"args": arguments(GPT_2B), "checkpoint_version": 3.0}))
    assert apart(folder, GPT_2B) <= TOLERANCE


def test_a_checkpoint_that_several_ranks_wrote(tmp_path: Path) -> None:
    folder = torch_dist_of_ranks(tmp_path / "c", stacked(core(state(GPT_2B)), GPT_2B.layers))
    (folder / "common.pt").write_bytes(saved({"args": arguments(GPT_2B)}))
    assert apart(folder, GPT_2B) <= TOLERANCE


def test_gate_and_up_saved_one_by_one(tmp_path: Path) -> None:
    tensors = {}
    for name, value in core(state(GPT_2B)).items():
        if name.endswith("linear_fc1.weight"):
            gate, up = value.chunk(2)
            tensors |= {f"{name}_w": gate.clone(), f"{name}_v": up.clone()}
        else:
            tensors[name] = value
    assert apart(torch_dist(tmp_path / "c", tensors, common(GPT_2B)), GPT_2B) <= TOLERANCE


@pytest.mark.parametrize("compressor", [None, "zlib", "zstd"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_zarr(compressor: str | None, parts: int, tmp_path: Path) -> None:
    folder = zarr(tmp_path / "c", stacked(core(state(GPT_2B)), GPT_2B.layers), parts=parts, compressor=compressor)
    (folder / "common.pt").write_bytes(saved({"args": arguments(GPT_2B)}))
    assert apart(folder, GPT_2B) <= TOLERANCE


@pytest.mark.parametrize("form", ["torch_dist", "zarr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nemo_archive_with_megatron_cores_layout(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: value.to(dtype) for name, value in state(GPT_2B).items()}
    tensors = prefixed(stacked(core(weights), GPT_2B.layers), "model.")
    folder = torch_dist(tmp_path / "c", tensors) if form == "torch_dist" else zarr(tmp_path / "c", tensors)
    path = write(tmp_path / "m.nemo", nemo_members(GPT_2B, weights, folder))
    assert apart(path, GPT_2B, weights, "nemo") <= TOLERANCE


WRITTEN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"window_size": (6, 0)},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "nemotron": {"squared_relu": True, "swiglu": False, "normalization": "LayerNorm", "apply_layernorm_1p": True},
    "stablelm": {"normalization": "LayerNorm", "add_qkv_bias": True},
}
"""Variant of ``dpo_testing.models`` → its arguments besides the sizes."""


@pytest.mark.parametrize("variant", WRITTEN)
def test_what_megatron_core_itself_writes(variant: str, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from dpo_trainer import bridge

    filesystem_async._results_queue = queue.Queue()  # otherwise it starts a process that outlives this one
    model = load_model(save_folder(reference_model(variant), tmp_path / "source"))
    with bridge.construction():
        sharded = model.sharded_state_dict()
    found = tmp_path / "c" / "iter_0000007"
    found.mkdir(parents=True)
    config: ModelConfig = model.dpo_config
    sizes = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "norm_epsilon": config.norm_eps,
        "rotary_percent": 1.0 if config.rotary_dim is None else config.rotary_dim / config.head_dim,
        "rotary_base": config.rope_theta,
        "untie_embeddings_and_output_weights": not config.tied_embeddings,
    }
    values = {"args": arguments(LLAMA, **sizes, **WRITTEN[variant]), "checkpoint_version": 3.0, "iteration": 7}
    dist_checkpointing.save({**sharded, **values}, str(found))
    (tmp_path / "c" / "latest_checkpointed_iteration.txt").write_text("7\n")
    again, _ = loaded(tmp_path / "c")
    assert again.dpo_config.fingerprint == config.fingerprint
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, again.state_dict()[name]), name


# -- which checkpoint


@pytest.fixture
def several(tmp_path: Path) -> Path:
    for name, seed in (("iter_0000002", 2), ("iter_0000010", 10), ("release", 1)):
        torch_dist(tmp_path / "c" / name, stacked(core(state(LLAMA, seed)), LLAMA.layers), common(LLAMA))
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("latest", "fields", "seed"),
    [(None, {}, 10), ("2", {}, 2), ("release", {}, 1), ("10", {"iteration": 2}, 2), (None, {"iteration": 10}, 10)],
)
def test_the_checkpoint_among_several(several: Path, latest: str | None, fields: dict[str, int], seed: int) -> None:
    if latest is not None:
        (several / "latest_checkpointed_iteration.txt").write_text(f"{latest}\n")
    assert apart(several, LLAMA, state(LLAMA, seed), **fields) <= TOLERANCE


def test_a_checkpoint_that_is_not_there(several: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"it holds no iter_0000003; iterations: 2, 10"):
        loaded(several, iteration=3)
    (several / "latest_checkpointed_iteration.txt").write_text("11\n")
    with pytest.raises(NotFoundError, match=r"latest_checkpointed_iteration\.txt says '11', and there is no such"):
        loaded(several)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="it holds no distributed checkpoint of Megatron-Core"):
        loaded(tmp_path / "empty")


def test_without_arguments_a_config_json_describes_the_model(tmp_path: Path) -> None:
    folder = torch_dist(tmp_path / "c", stacked(core(state(LLAMA)), LLAMA.layers))
    with pytest.raises(InvalidModelError, match=r"does not hold Megatron-LM's arguments.*architectureURI"):
        loaded(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", "vocab_size": LLAMA.vocab, "rms_norm_eps": LLAMA.eps, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert apart(folder, LLAMA, architectureURI=str(tmp_path / "config.json")) <= TOLERANCE


# -- sizes and damage


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 3}, r"its settings name 3 layers, and its weights have 2; copy or download it again"),
        ({"num_layers": 1}, r"its settings name 1 layers, and its weights have 2"),
        ({"num_experts": 2}, "num_experts is 2"),
        ({"ffn_hidden_size": 41}, r"linear_fc1\.weight has shape \[80, 32\] in 1 parts?, the settings mean \[82, 32\]"),
        ({"untie_embeddings_and_output_weights": False}, None),
        ({"swiglu": False}, "swiglu is false: only swiglu and squared_relu"),
        ({"num_experts": 8}, "num_experts is 8: it is not supported"),
        ({"add_bias_linear": True}, "add_bias_linear is true: it is not supported"),
        ({"hidden_size": None}, "hidden_size is missing; copy the model's original checkpoint"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], says: str | None, tmp_path: Path) -> None:
    folder = torch_dist(tmp_path / "c", stacked(core(state(GPT_2B)), GPT_2B.layers), common(GPT_2B, **changes))
    if says is None:  # the head is there, and not used
        loaded(folder)
        return
    with pytest.raises(InvalidModelError, match=says):
        loaded(folder)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    folder = torch_dist(tmp_path / "c", stacked(core(state(GPT_2B)), GPT_2B.layers), common(GPT_2B))
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(InvalidModelError, match=r"\.metadata .*refers to the file '__0_0\.distcp', which is missing"):
        loaded(folder)
    folder = zarr(tmp_path / "z", stacked(core(state(GPT_2B)), GPT_2B.layers))
    shutil.copy(tmp_path / "z" / "metadata.json", folder / "common.json")
    (folder / "output_layer.weight" / "0.0").unlink()
    with pytest.raises(InvalidModelError, match=r"output_layer\.weight/0\.0 is missing"):
        loaded(folder)
