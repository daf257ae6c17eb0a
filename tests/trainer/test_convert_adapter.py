"""`dpo convert --adapter`: the model that is written is what PEFT merges, whatever its format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_api.models.adapter import read_adapter
from dpo_testing.adapters import write_adapter
from dpo_testing.models import local_store, reference_model, save_folder
from dpo_trainer.convert import command
from dpo_trainer.convert.journal import NAME, Journal
from dpo_trainer.formats.adapter import AdapterMatrices, MergedWeights
from dpo_trainer.formats.safetensors_reader import DTYPES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(reference_model("llama"), tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapter") / "sft")


def convert(*words: object) -> None:
    assert command.main([str(word) for word in words]) == 0


def tensors(folder: Path) -> dict[str, Tensor]:
    whole = command.open_model(local_store(), str(folder))
    return {name: whole.weights.read(name) for name, _ in whole.names}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_format_holds_the_model_that_peft_merges(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = [tmp_path / "folder", tmp_path / "megatron", tmp_path / "model.nemo"]
    for target, form in zip(targets, command.FORMATS, strict=True):
        convert(base, "--adapter", adapter, target, "--to", form)
        assert f"are equal to those of {base} with {adapter}\n" in capsys.readouterr().out
    found = [tensors(target) for target in targets]
    expected = tensors(adapter / "merged")
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    convert(base, tmp_path / "base.nemo")
    convert(tmp_path / "base.nemo", "--adapter", adapter, tmp_path / "back")
    assert same(found[0], tensors(tmp_path / "back"))
    moved = {name for name, tensor in tensors(base).items() if not torch.equal(tensor, found[0][name])}
    assert {name.split(".", 3)[-1] for name in moved} == {
        "self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.down_proj.weight"
    }  # fmt: skip


@pytest.mark.parametrize(("asked", "written"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_the_sum_is_rounded_once_to_the_type_that_is_written(
    asked: str | None, written: torch.dtype, adapter: Path, tmp_path: Path
) -> None:
    narrow = save_folder(reference_model("llama", dtype=torch.bfloat16), tmp_path / "narrow")
    convert(narrow, "--adapter", adapter, tmp_path / "out", *([] if asked is None else ["--dtype", asked]))
    source = command.open_model(local_store(), str(narrow), torch.float32, str(adapter))
    exact = {name: source.tensor(name) for name, _ in source.names}
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {written}
    assert same(found, {name: tensor.to(written) for name, tensor in exact.items()})
    dtype = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert DTYPES["BF16" if dtype == "bfloat16" else "F32"] == written


def test_a_row_of_a_sum_has_the_same_bits_whatever_is_read_with_it(base: Path, adapter: Path) -> None:
    store = local_store()
    whole = command.open_model(store, str(base))
    merged = MergedWeights(whole.weights, AdapterMatrices(store, read_adapter(store, str(adapter), whole.config)))
    name, count = "model.layers.1.mlp.down_proj.weight", 48
    merged.ROWS = 20
    expected = merged.read(name)
    assert expected.shape[0] == count
    for first in range(count):
        for last in (first + 1, min(first + 7, count), count):
            assert torch.equal(merged.read(name, (first, last)), expected[first:last]), (first, last)


def test_a_wrong_adapter_is_refused_before_anything_is_written(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_folder(reference_model("llama", intermediate_size=64), tmp_path / "other")

    def refused(*words: Any) -> str:
        code = command.main([str(word) for word in (other, tmp_path / "out", *words)])
        assert code != 0
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "lora_A of model.layers.0.mlp.down_proj has shape" in refused("--adapter", adapter)
    assert "adapter_config.json" in refused("--adapter", tmp_path / "nothing")


def test_a_part_of_a_conversion_with_an_adapter_is_continued_with_it_only(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "close", lambda _journal: None)  # the process ends before its last act
        convert(base, "--adapter", adapter, tmp_path / "out")
    for words in ([], ["--adapter", str(write_adapter(base, tmp_path / "other", r=4))]):
        assert command.main([str(base), str(tmp_path / "out"), *words]) == 64
        assert "a part of another conversion" in capsys.readouterr().err
    convert(base, "--adapter", adapter, tmp_path / "out")
    assert not (tmp_path / "out" / NAME).exists()
