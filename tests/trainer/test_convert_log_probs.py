"""The end of `dpo convert`: a model computes its log-probs layer by layer, and a wrong configuration changes them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_api.errors import InvalidModelError
from dpo_api.models import ModelConfig
from dpo_api.models.megatron.shape import Shape
from dpo_testing.models import VARIANTS, edit_config, load_model, reference_model, save_folder, single_process
from dpo_testing.models import local_store as store
from dpo_trainer.convert import command, compare, huggingface, megatron, nemo
from dpo_trainer.convert.forward import TOKENS, Forward, check_pack
from dpo_trainer.convert.whole import Whole
from dpo_trainer.logprobs import response_log_probs
from dpo_trainer.model.forward import head_weight, hidden_rows

QUICK = ("llama", "smollm3", "granite", "olmo2", "gemma3", "nemotron")


def layer_by_layer(whole: Whole) -> Tensor:
    with single_process():
        return compare._log_probs(whole, whole)[1]


@pytest.mark.parametrize(
    "variant", [*QUICK, *(pytest.param(name, marks=pytest.mark.nightly) for name in VARIANTS if name not in QUICK)]
)
def test_log_probs_are_those_of_the_model_in_training(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "BLOCK_BYTES", 4000)  # of the embedding and the head, which are 24 KiB
    folder = save_folder(reference_model(variant), tmp_path / "model")
    whole = command.open_model(store(), str(folder))
    found = layer_by_layer(whole)
    with single_process(), torch.no_grad():
        model, pack = load_model(folder), check_pack(whole.config)
        expected = response_log_probs(hidden_rows(model, pack), head_weight(model), pack.labels)
    assert found.std() >= 0.5
    assert (found - expected).abs().max() <= 1e-5


def test_a_model_whose_layers_come_and_go_has_no_memory_of_its_own(tmp_path: Path) -> None:
    config = command.open_model(store(), str(save_folder(reference_model("llama"), tmp_path / "model"))).config
    with single_process():
        parameters = dict(Forward(config, check_pack(config))._gpt.named_parameters())
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    assert len(matrices) == 14
    assert all(matrix.is_meta for matrix in matrices)


@pytest.mark.parametrize("longest", [8, 512, 4096, 131_072, 1_048_576])
def test_positions_reach_to_the_last_one_of_the_model(longest: int) -> None:
    pack = check_pack(ModelConfig("llama", 120, 48, 80, 2, 6, 2, 8, max_positions=longest))
    pack.validate()
    assert (pack.position_ids[:2].tolist(), int(pack.position_ids[-1])) == ([0, 1], max(longest, TOKENS) - 1)
    assert (pack.position_ids.diff() > 0).all()


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "theta": ({"rope_parameters": {"rope_theta": 1.01e4}}, {"rotary_base": 1.01e4}, "rope_theta"),
    "epsilon": ({"rms_norm_eps": 2e-6}, {"eps": 2e-6}, "norm_eps"),
    "window": ({"sliding_window": 8}, {"window": 8}, "window"),
}
"""What is wrong → keys of config.json, fields of Megatron's shape, and the field of the configuration."""


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("form", ["huggingface", "megatron", "nemo"])
def test_a_wrong_configuration_is_found_with_the_right_parameters(
    form: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_folder(reference_model("mistral"), tmp_path / "source")
    keys, fields, named = WRONG[wrong]
    write_config = huggingface.write_config

    def edited(*words: Any) -> None:
        write_config(*words)
        edit_config(Path(words[3]), **keys)

    def changed(right: Callable[..., Shape]) -> Callable[..., Shape]:
        return lambda *words: replace(right(*words), **fields)

    monkeypatch.setattr(huggingface, "write_config", edited)
    monkeypatch.setattr(megatron, "shape_of", changed(megatron.shape_of))
    monkeypatch.setattr(nemo, "shape_of", changed(nemo.shape_of))

    def convert(name: str) -> str:
        words = [str(source), str(tmp_path / name) + (".nemo" if form == "nemo" else ""), f"--to={form}"]
        assert command.main(words) == InvalidModelError("").exit_code
        return capsys.readouterr().err

    assert f"its {named} is " in convert("configuration")
    monkeypatch.setattr(compare, "_computed", lambda _model: {})
    assert "with the same parameters: its configuration means another model" in convert("log-probs")


def test_a_type_that_is_too_narrow_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = reference_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6  # fp16 ends at 65,504
    source = save_folder(model, tmp_path / "source")
    words = [str(source), str(tmp_path / "out"), "--dtype=fp16"]
    assert command.main(words) == InvalidModelError("").exit_code
    assert "source: its log-probs are not finite in float16" in capsys.readouterr().err
    assert command.main([str(source), str(tmp_path / "wide"), "--dtype=bf16"]) == 0
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "bfloat16"
