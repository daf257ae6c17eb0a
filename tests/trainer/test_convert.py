"""`dpo convert`: what it writes equals the source, is read by Megatron-Core, and is never taken for whole too early."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_api.errors import DPOError, InvalidModelError
from dpo_api.models import read_config
from dpo_store import Store
from dpo_testing.models import (
    edit_config,
    load_model,
    local_store,
    reference_model,
    save_folder,
    single_process,
    token_stream,
)
from dpo_testing.nemo_archives import GPT_2B, LLAMA, Tiny, content, logits, replace, state, write
from dpo_trainer.convert import command
from dpo_trainer.convert.journal import NAME, Journal
from dpo_trainer.convert.whole import Whole
from dpo_trainer.model.forward import unwrap

SMALL = "--max-shard-bytes=60000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(reference_model("llama"), tmp_path_factory.mktemp("model"))


def convert(*words: object) -> None:
    assert command.main([str(word) for word in words]) == 0


def tensors(folder: Path) -> dict[str, Tensor]:
    whole = command.open_model(local_store(), str(folder))
    return {name: whole.tensor(name) for name, _ in whole.names}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_folder_has_the_same_tensors_in_other_files(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", SMALL)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model-00001-of-00005.safetensors", "model.safetensors.index.json", "chat_template.jinja"} <= names
    assert NAME not in names
    assert same(tensors(folder), tensors(tmp_path / "out"))


def test_another_type(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", "--dtype", "bf16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = {name: tensor.bfloat16() for name, tensor in tensors(folder).items()}
    assert same(rounded, tensors(tmp_path / "out"))


@torch.no_grad()
def test_gpt_2b_becomes_a_model_that_transformers_loads(tmp_path: Path) -> None:
    weights, tokens = state(GPT_2B), token_stream(40, vocabulary=GPT_2B.vocab)
    archive = write(tmp_path / "gpt.nemo", content(GPT_2B, weights))
    convert(archive, tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = logits(GPT_2B, weights, tokens)
    assert expected.std() >= 1
    assert (model(tokens[None]).logits[0] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("tiny", "says"),
    [(GPT_2B, None), (replace(LLAMA, qkv_bias=True), "transformers reads every tokenizer of the family qwen2 as the")],
    ids=["stablelm", "qwen2"],
)
def test_a_bare_sentencepiece_model(
    tiny: Tiny, says: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(write(tmp_path / "gpt.nemo", content(tiny, state(tiny))), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists() is (says is None)
    assert (says or "") in caplog.text
    assert bool(caplog.text) is (says is not None)


def loaded_by_megatron(folder: Path, checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Return the folder's parameters, those that Megatron-Core reads from the checkpoint, and its arguments."""
    with single_process():
        gpt = unwrap(load_model(folder))
        expected = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
        for parameter in gpt.parameters():
            parameter.data.zero_()
        found = dist_checkpointing.load(gpt.sharded_state_dict(), str(checkpoint))
        gpt.load_state_dict({name: found[name] for name in expected}, strict=False)
        return expected, {name: parameter.detach() for name, parameter in gpt.named_parameters()}, found.get("args")


@pytest.mark.parametrize(
    "variant",
    ["llama", "nemotron", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("qwen2", "qwen3", "stablelm"))],
)
@pytest.mark.parametrize("form", ["megatron", "nemo"])
def test_there_and_back(variant: str, form: str, tmp_path: Path) -> None:
    source = save_folder(reference_model(variant), tmp_path / "source")
    convert(source, tmp_path / f"there.{form}", "--to", form)
    convert(tmp_path / f"there.{form}", tmp_path / "back", "--to", "huggingface")
    assert same(tensors(source), tensors(tmp_path / "back"))
    reader = local_store()
    assert read_config(reader, str(tmp_path / "back")) == read_config(reader, str(source))


@pytest.mark.parametrize("variant", ["llama", "qwen2", "nemotron"])
def test_megatron_core_reads_its_checkpoint(variant: str, tmp_path: Path) -> None:
    source = save_folder(reference_model(variant), tmp_path / "source")
    convert(source, tmp_path / "out", "--to", "megatron")
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    expected, found, arguments = loaded_by_megatron(source, tmp_path / "out" / "release")
    assert same(expected, found)
    assert isinstance(arguments, Namespace)
    config = read_config(local_store(), str(source))
    assert (arguments.num_layers, arguments.num_query_groups) == (config.num_layers, config.num_query_groups)
    assert arguments.add_qkv_bias is (variant == "qwen2")
    assert (arguments.swiglu, arguments.squared_relu) == (variant != "nemotron", variant == "nemotron")


def test_a_nemo_archive_holds_that_checkpoint_and_the_settings(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "model.nemo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.nemo"]
    with tarfile.open(tmp_path / "model.nemo") as archive:
        assert archive.getnames()[0] == "./model_config.yaml"
        archive.extractall(tmp_path / "unpacked", filter="data")
    metadata = torch.distributed.checkpoint.FileSystemReader(tmp_path / "unpacked" / "model_weights").read_metadata()
    assert all(key.startswith("model.") for key in metadata.state_dict_metadata)


class Stopped(BaseException):
    """The process is killed."""


@pytest.mark.parametrize("form", ["huggingface", "megatron", "nemo"])
def test_a_stopped_conversion_is_no_model_and_continues(
    form: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / ("out.nemo" if form == "nemo" else "out")
    words = [folder, target, "--to", form, SMALL]
    add = Journal.add

    def stop_after_two(journal: Journal, file: str, note: Any) -> None:
        add(journal, file, note)
        if len(journal._done) == 2:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", stop_after_two)
        with pytest.raises(Stopped):
            convert(*words)
    with pytest.raises(DPOError):
        tensors(target)
    assert not list(tmp_path.rglob(".metadata"))
    read = Whole.tensor if form == "huggingface" else Whole.parameter
    seen: list[object] = []

    def counting(whole: Whole, what: Any) -> Tensor:
        seen.append(what)
        return read(whole, what)

    monkeypatch.setattr(Whole, read.__name__, counting)
    convert(*words, "--no-check")
    assert 0 < len(seen) < (30 if form == "huggingface" else 21), "what the first run has written is not read again"
    assert same(tensors(folder), tensors(target))


def test_a_killed_process_continues(tmp_path: Path) -> None:
    big = reference_model("llama", hidden_size=192, intermediate_size=512, vocab_size=20_000)
    source = save_folder(big, tmp_path / "source")
    target = tmp_path / "out"
    words = [sys.executable, "-m", "dpo_trainer", "convert", source, target, "--max-shard-bytes=1000000"]
    child = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(list(target.glob("*.safetensors"))) < 2 and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(DPOError):
        tensors(target)
    subprocess.run(words, check=True)
    assert same(tensors(source), tensors(target))
    assert not (target / NAME).exists()


def test_another_target_is_asked_for(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert command.main([str(folder), str(tmp_path / "full")]) == 64
    assert f"{tmp_path}/full is not empty (it holds notes.txt); choose another target" in capsys.readouterr().err
    assert command.main([str(folder), str(tmp_path / "model"), "--to", "nemo"]) == 64
    assert "ends with .nemo" in capsys.readouterr().err
    assert command.main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 11
    assert "nothing does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_conversion_is_left_as_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Journal(local_store(), str(tmp_path / "out"), {"source": "other", "format": "megatron"})
    assert command.main([str(folder), str(tmp_path / "out")]) == 64
    assert "a part of another conversion: of other to megatron" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 2.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1.5}}, "rope_scaling"),
    ],
    ids=["llama3", "linear"],
)  # fmt: skip
def test_what_megatron_cannot_say_is_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_folder(reference_model("llama"), tmp_path / "source")
    edit_config(source, **changes)
    assert command.main([str(source), str(tmp_path / "out"), "--to", "megatron"]) == InvalidModelError("").exit_code
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_byte_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_blocks = Store.write_blocks

    def wrong(store: Store, uri: str, blocks: Any, size: int) -> None:
        data = b"".join(bytes(block) for block in blocks)
        write_blocks(store, uri, iter([data[:-1], bytes([data[-1] ^ 1])]), size)

    monkeypatch.setattr(Store, "write_blocks", wrong)
    assert command.main([str(folder), str(tmp_path / "out")]) == InvalidModelError("").exit_code
    assert "is not that of" in capsys.readouterr().err
    assert (tmp_path / "out" / NAME).exists(), "the folder still says that it is not complete"


def test_no_archive_is_seen_before_it_is_complete(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.nemo"
    stream = Store.stream
    seen: list[bool] = []

    def looking(store: Store, *words: Any, **options: Any) -> Any:
        seen.append(target.exists())
        return stream(store, *words, **options)

    monkeypatch.setattr(Store, "stream", looking)
    convert(folder, target)
    assert seen
    assert not any(seen)
    assert target.exists()
