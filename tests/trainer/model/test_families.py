"""Every family: adapters that PEFT loads, merged folders that transformers loads, and parameters that are counted."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_api.learning import Lora
from dpo_api.models import FAMILIES, read_config
from dpo_api.sizing import parameters
from dpo_testing.models import (
    VARIANTS,
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
from dpo_trainer.model.lora import adapters, attach_lora, merged_value

PACK = plain_pack([token_stream(30, seed=3)])


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


def test_every_family_is_checked() -> None:
    """What runs for each variant, in this folder and in tests/distributed, runs for each family."""
    import transformers

    checked = {getattr(transformers, name).model_type for name, _ in VARIANTS.values()}
    assert checked == FAMILIES.keys()


@torch.no_grad()
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_peft_and_merged_folders_answer_as_we_do(variant: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def distance(theirs: Any) -> float:
        return float((theirs.eval()(PACK.tokens[None]).logits[0] - ours).abs().max())

    folder = save_folder(reference_model(variant), tmp_path / "start")
    lora = Lora(rank=4, alpha=6.0, target_modules=("all",), column_init="kaiming")
    model = load_model(folder).eval()
    start = logits(model, PACK)
    attach_lora(model, lora, seed=1)
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters(model):
        adapter.linear_out.weight.normal_(std=0.1, generator=generator)
    ours = logits(model, PACK)
    assert (ours - start).abs().max() > 0.1
    export_adapter(model, lora, str(folder), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert distance(PeftModel.from_pretrained(base, tmp_path / "adapter")) <= 2e-5
    export(model, local_store(), str(folder), tmp_path / "merged", value_of=merged_value(model))
    assert distance(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")) <= 2e-5
    assert (logits(load_model(tmp_path / "merged"), PACK) - ours).abs().max() <= 2e-5


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_parameters_are_all_counted(variant: str, tmp_path: Path) -> None:
    """The memory model's count is the sum over transformers' parameters, each once."""
    reference = reference_model(variant)
    facts = read_config(local_store(), str(save_folder(reference, tmp_path))).facts
    assert parameters(facts) == sum(parameter.numel() for parameter in reference.parameters())
