"""PEFT's adapters of single projections, trained on beside fused layers: its outputs, its gradients, its files."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_api.learning import Lora
from dpo_api.models import read_config
from dpo_api.models.adapter import continued, read_adapter
from dpo_testing.adapters import write_adapter
from dpo_testing.models import (
    load_model,
    local_store,
    plain_pack,
    reference_model,
    save_folder,
    single_process,
    token_stream,
)
from dpo_trainer.formats.adapter import AdapterMatrices
from dpo_trainer.formats.export import export
from dpo_trainer.formats.peft import adapter_tensors, export_adapter
from dpo_trainer.model.forward import logits
from dpo_trainer.model.lora import adapter_state, adapters, attach_lora, merged_value

PACK = plain_pack([token_stream(30, seed=3)])
ALL = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
TARGETS: dict[str, tuple[str, Any]] = {
    "all": ("llama", ALL["llama"]),
    "queries and values": ("llama", ["q_proj", "v_proj"]),
    "up alone": ("llama", ["up_proj"]),
    "other layers each": ("llama", r".*layers\.(0\.self_attn\.k_proj|1\.self_attn\.v_proj|1\.mlp\.gate_proj)"),
    "fused in the files": ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"]),
    "without a gate": ("nemotron", ["k_proj", "up_proj", "down_proj"]),
}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


@pytest.fixture(scope="module", params=list(TARGETS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and one of an adapter."""
    family, targets = TARGETS[request.param]
    folder = save_folder(reference_model(family), tmp_path_factory.mktemp("model"))
    return folder, write_adapter(folder, tmp_path_factory.mktemp("sft"), target_modules=targets, use_rslora=True)


def continuing(case: tuple[Path, Path], **kwargs: Any) -> tuple[Any, Lora, AdapterMatrices]:
    folder, sft = case
    config = read_config(local_store(), str(folder))
    start = AdapterMatrices(local_store(), read_adapter(local_store(), str(sft), config))
    lora = continued(Lora(continue_adapter=True), start.adapter, config)
    model = load_model(folder, **kwargs)
    attach_lora(model, lora, seed=1, start=start)
    return model.eval(), lora, start


def peft(case: tuple[Path, Path], adapter: Path | None = None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(case[0], dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter or case[1], is_trainable=True).eval()


def test_outputs_and_gradients_are_those_of_peft(case: tuple[Path, Path]) -> None:
    model, _, start = continuing(case)
    theirs = peft(case)
    ours, expected = logits(model, PACK), theirs(PACK.tokens[None]).logits[0]
    assert (ours - expected).abs().max() <= 2e-5
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = adapter_tensors(model, lambda matrix: matrix.grad)  # type: ignore[arg-type,return-value]
    assert len(gradients) == 2 * len(start.adapter.targets)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert gradient.abs().max() > 0
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp_min(1.0), name
    for name in found.keys() - gradients.keys():
        assert not found[name].any(), f"{name} has no adapter, and would learn"


def test_a_checkpoint_has_no_gaps(case: tuple[Path, Path]) -> None:
    """Each matrix is stacked over the layers that have one of its kind, and no others."""
    model, _, _ = continuing(case)
    held = Counter(adapter.place.module for adapter in adapters(model))
    kinds = {"qkv": "attention_qkv", "proj": "attention_dense", "fc1": "mlp_fc1", "fc2": "mlp_fc2"}
    places: dict[str, list[tuple[int, int]]] = {}
    for entry in adapter_state(model.sharded_state_dict()).values():
        for tensor in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            places.setdefault(tensor.key, []).append((tensor.global_shape[0], tensor.global_offset[0]))
    assert len(places) == 2 * len(held)
    for key, found in places.items():
        (count,) = {held[module] for kind, module in kinds.items() if f"linear_{kind}.adapter" in key}
        assert {size for size, _ in found} == {count}, key
        assert {offset for _, offset in found} == set(range(count)), key


@torch.no_grad()
def test_it_leaves_as_it_came(case: tuple[Path, Path], tmp_path: Path) -> None:
    """Untrained, the files hold the same bits; changed, PEFT and the merged folder answer as we do."""
    model, lora, start = continuing(case)
    export_adapter(model, lora, "elsewhere", tmp_path / "same", below=start)
    given, written = (load_file(folder / "adapter_model.safetensors") for folder in (case[1], tmp_path / "same"))
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name], written[name]) for name in given)
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (case[1], tmp_path / "same"))
    assert {name for name in before if before[name] != after[name]} <= {"base_model_name_or_path"}
    for matrix in (m for adapter in adapters(model) for m in adapter.parameters()):
        matrix.mul_(0.5)
    export_adapter(model, lora, str(case[0]), tmp_path / "changed", below=start)
    export(model, local_store(), str(case[0]), tmp_path / "merged", value_of=merged_value(model))
    ours = logits(model, PACK)
    assert (peft(case)(PACK.tokens[None]).logits[0] - ours).abs().max() > 0.1
    assert (peft(case, tmp_path / "changed")(PACK.tokens[None]).logits[0] - ours).abs().max() <= 2e-5
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (whole(PACK.tokens[None]).logits[0] - ours).abs().max() <= 2e-5
