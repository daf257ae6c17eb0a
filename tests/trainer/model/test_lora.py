"""LoRA on fused layers: against PEFT, merged, switched off, and in checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from dpo_api.errors import InvalidSpecError
from dpo_api.learning import Lora
from dpo_testing.models import (
    load_model,
    local_store,
    plain_pack,
    reference_model,
    save_folder,
    shared_pack,
    single_process,
    token_stream,
)
from dpo_trainer.formats.export import export
from dpo_trainer.formats.peft import export_adapter
from dpo_trainer.model.forward import count_parameters, hidden_rows, logits
from dpo_trainer.model.lora import adapter_state, adapters, adapters_disabled, attach_lora, merged_value

PACK = plain_pack([token_stream(30, seed=3)])


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(reference_model("qwen2"), tmp_path_factory.mktemp("qwen2"))


def adapted(folder: Path, lora: Lora, *, seed: int = 1, **kwargs: Any) -> Any:
    """A model whose adapters do something: B is random too."""
    model = load_model(folder, **kwargs)
    attach_lora(model, lora, seed=seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.linear_out.weight.normal_(std=0.2, generator=generator)
    return model.eval()


ALL = Lora(rank=4, alpha=6.0, target_modules=("all",), column_init="kaiming")
SETTINGS = {
    "default": Lora(rank=8),
    "all": ALL,
    "some layers": Lora(rank=3, alpha=1.0, rslora=True, target_modules=("mlp", "attention_dense"), layers=(2, 0)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", list(SETTINGS))
def test_peft_and_merged_folders_answer_as_we_do(name: str, folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(folder, SETTINGS[name])
    ours = logits(model, PACK)
    assert (ours - logits(load_model(folder), PACK)).abs().max() > 0.1
    export_adapter(model, SETTINGS[name], str(folder), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (peft(PACK.tokens[None]).logits[0] - ours).abs().max() <= 2e-5
    export(model, local_store(), str(folder), tmp_path / "merged", value_of=merged_value(model))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (merged(PACK.tokens[None]).logits[0] - ours).abs().max() <= 2e-5
    assert (logits(load_model(tmp_path / "merged"), PACK) - ours).abs().max() <= 2e-5


def test_peft_config_names_what_was_trained(folder: Path, tmp_path: Path) -> None:
    export_adapter(adapted(folder, SETTINGS["some layers"]), SETTINGS["some layers"], "s3://m/base", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "s3://m/base"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 1, True)
    assert config["target_modules"] == ["o_proj", "gate_proj", "up_proj", "down_proj"]
    assert config["layers_to_transform"] == [0, 2]


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_off_is_the_start_model(folder: Path) -> None:
    start = logits(load_model(folder), PACK)
    fresh = load_model(folder)
    attach_lora(fresh, ALL, seed=1)
    assert torch.equal(logits(fresh, PACK), start)
    model = adapted(folder, ALL)
    with adapters_disabled(model):
        assert torch.equal(logits(model, PACK), start)
    assert (logits(model, PACK) - start).abs().max() > 0.1


@pytest.mark.parametrize("modules", [ALL.target_modules, ("mlp_fc1",)], ids=["all", "the MLP's first layer"])
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_only_adapters_get_gradients(recomputation: Any, modules: tuple[str, ...], folder: Path) -> None:
    lora = ALL.model_copy(update={"target_modules": modules})
    model = adapted(folder, lora, recomputation=recomputation).train()
    hidden_rows(
        model, shared_pack([(token_stream(5), token_stream(6, seed=1), token_stream(7, seed=2))])
    ).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapter." in name), name
        assert (parameter.grad is not None) == (".adapter." in name), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name
    everything, trainable = count_parameters(model)
    assert 0 < trainable < everything


def test_gradients_are_those_of_peft(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = Lora(rank=4, alpha=2.0, target_modules=("attention_dense", "mlp_fc2"))
    model = adapted(folder, lora)
    export_adapter(model, lora, str(folder), tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path, is_trainable=True).eval()
    weight = torch.randn(len(PACK.tokens), 131, generator=torch.Generator().manual_seed(2))
    (logits(model, PACK) * weight).sum().backward()
    (peft(PACK.tokens[None]).logits[0] * weight).sum().backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in peft.named_parameters() if p.grad is not None}
    for adapter in adapters(model):
        names = {"attention_dense": "self_attn.o_proj", "mlp_fc2": "mlp.down_proj"}
        prefix = f"base_model.model.model.layers.{adapter.place.layer}.{names[adapter.place.module]}"
        for ours, suffix in ((adapter.linear_in.weight, "lora_A"), (adapter.linear_out.weight, "lora_B")):
            assert ours.grad is not None
            expected = theirs[f"{prefix}.{suffix}.weight"]
            assert (ours.grad - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1.0)


def test_initial_values(folder: Path) -> None:
    """xavier normal for A, zero for B, decided by the seed alone."""
    model, twin, other = (load_model(folder) for _ in range(3))
    for target, seed in ((model, 1), (twin, 1), (other, 2)):
        attach_lora(target, Lora(rank=16, target_modules=("all",)), seed=seed)
    for a, b, c in zip(adapters(model), adapters(twin), adapters(other), strict=True):
        first = a.linear_in.weight
        assert torch.equal(first, b.linear_in.weight)
        assert not torch.equal(first, c.linear_in.weight)
        expected = (2 / sum(first.shape)) ** 0.5
        assert first.std().item() == pytest.approx(expected, rel=0.15)
        assert bool((a.linear_out.weight == 0).all())
    whole = [adapter.linear_in.weight for adapter in adapters(model)]
    assert len({tuple(w.flatten()[:4].tolist()) for w in whole}) == len(whole)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_acts_in_training_only_and_where_it_is_told(position: Any, folder: Path) -> None:
    model = adapted(folder, Lora(rank=8, dropout=0.5, dropout_position=position, target_modules=("mlp_fc2",)))
    adapter = next(iter(adapters(model)))
    x = torch.randn(50, 1, 80, generator=torch.Generator().manual_seed(1))
    adapter.tokens.set(torch.randint(-(2**62), 2**62, (50,), generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        base = torch.zeros(50, 1, adapter.linear_out.weight.shape[0])
        quiet = adapter(x, base)
        assert torch.equal(quiet, adapter(x, base))
        noisy = adapter.train()(x, base)
    zeros = (noisy == 0).float().mean().item()
    if position == "post":
        assert zeros == pytest.approx(0.5, abs=0.05)
        kept = noisy != 0
        torch.testing.assert_close(noisy[kept], 2 * quiet[kept])
    else:
        assert zeros == 0
        assert not torch.equal(noisy, quiet)


def test_checkpoints_hold_adapters_and_stack_only_their_layers(folder: Path) -> None:
    model = adapted(folder, SETTINGS["some layers"])
    entries = adapter_state(model.sharded_state_dict())
    assert len(entries) == 2 * 3 * 2  # layers · modules · matrices
    plain = load_model(folder).sharded_state_dict()
    assert not adapter_state(plain)
    assert plain.keys() <= model.sharded_state_dict().keys()
    shapes: dict[str, list[Any]] = {}
    for entry in entries.values():
        found = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for tensor in found:
            assert isinstance(tensor, ShardedTensor)
            shapes.setdefault(tensor.key, []).append((tensor.global_shape[0], tensor.global_offset[0]))
    for key, places in shapes.items():
        assert {count for count, _ in places} == {2}, key
        assert {offset for _, offset in places} == {0, 1}, key


@pytest.mark.parametrize("layers", [(3,), (0, 7)])
def test_a_layer_that_does_not_exist_is_named(layers: tuple[int, ...], folder: Path) -> None:
    with pytest.raises(InvalidSpecError, match=rf"spec\.lora\.layers names layer {layers[-1]}.*0 to 2"):
        attach_lora(load_model(folder), Lora(layers=layers), seed=0)


@torch.no_grad()
def test_merging_adds_in_fp32(folder: Path) -> None:
    """In bf16, base + delta is rounded once."""
    model = adapted(folder, Lora(rank=4), precision="bf16")
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    value = merged_value(model)(name, model.get_parameter(name))
    assert value.dtype == torch.float32
    adapter: Any = model.decoder.layers[0].self_attention.linear_qkv.adapter
    exact: Tensor = (
        model.get_parameter(name).double() + adapter.linear_out.weight.double() @ adapter.linear_in.weight.double()
    )
    assert (value - exact).abs().max() <= 1e-6
