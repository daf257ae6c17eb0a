"""Hugging Face folders in and out: bit-exact round trips, and every damaged file named."""

import hashlib
import json
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_api.errors import DPOError, InvalidModelError, NoSpaceError, NotFoundError
from dpo_api.models import ModelConfig, read_config
from dpo_store import ObjectInfo
from dpo_testing.families import there_and_back, unlike_weights
from dpo_testing.models import (
    VARIANTS,
    VOCABULARY,
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
from dpo_trainer.formats.huggingface import check_tokenizer, load_weights
from dpo_trainer.formats.safetensors_reader import SafetensorsFile
from dpo_trainer.model.build import build_model
from dpo_trainer.model.forward import logits


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


def assert_same_weights(left: Path, right: Path) -> None:
    assert unlike_weights(left, right) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_round_trip_is_bit_exact(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, names = there_and_back(variant, dtype, tmp_path)
    assert_same_weights(source, tmp_path / "out")
    assert {"config.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(names)
    for name in names:
        if not name.startswith("model"):
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name


def test_float16_survives_a_model_in_fp32(tmp_path: Path) -> None:
    source = save_folder(reference_model("llama", dtype=torch.float16), tmp_path / "in")
    export(load_model(source), local_store(), str(source), tmp_path / "out")
    assert_same_weights(source, tmp_path / "out")


@torch.no_grad()
def test_several_files_in_and_out(tmp_path: Path) -> None:
    reference = reference_model("qwen2")
    source = save_folder(reference, tmp_path / "in", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    names = export(load_model(source), local_store(), str(source), tmp_path / "out", max_shard_bytes=70_000)
    assert_same_weights(source, tmp_path / "out")
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2
    for name in shards:
        assert (tmp_path / "out" / name).stat().st_size < 80_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in reference.parameters())
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = token_stream(12)[None]
    assert torch.equal(again(tokens).logits, AutoModelForCausalLM.from_pretrained(source)(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", ["llama3", "llama-linear", "llama-yarn", "mistral", "qwen3", "nemotron", "phi3", "gemma3"]
)
def test_another_dtype_rewrites_the_config_for_old_and_new_transformers(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_folder(reference_model(variant), tmp_path / "in")
    model = load_model(source)
    export(model, local_store(), str(source), tmp_path / "out", dtype=torch.bfloat16)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    rope = raw["rope_parameters"]
    assert raw["rope_theta"] == rope.get("full_attention", rope)["rope_theta"] == model.dpo_config.rope_theta
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    expected = logits(model, plain_pack([token_stream(12)]))
    assert (again.float()(token_stream(12)[None]).logits[0] - expected).abs().max() < 0.2
    old = dict(raw)
    del old["rope_parameters"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(old))
    new = read_config(local_store(), str(tmp_path / "out"))
    assert new == replace(model.dpo_config, dtype="bfloat16")


def test_the_key_is_of_content(tmp_path: Path) -> None:
    """Same weights in other files: same key; one bit or one architecture setting: another."""
    reference = reference_model("llama")
    one = save_folder(reference, tmp_path / "one")
    many = save_folder(reference, tmp_path / "many", max_shard_size="60KB")
    key = fingerprint(one)
    assert key == fingerprint(many) == by_hand(one, reference)
    path = one / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert fingerprint(one) != key
    edit_config(many, rms_norm_eps=1e-5)
    assert fingerprint(many) != key


def fingerprint(folder: Path) -> str:
    store = local_store()
    return load_weights(build_model(read_config(store, str(folder))), store, str(folder)).fingerprint


def by_hand(folder: Path, reference: Any) -> str:
    """References are cached, and checkpoints kept, under this key: it must never change for the same model."""
    lines = [read_config(local_store(), str(folder)).fingerprint]
    for name, value in sorted(reference.state_dict().items()):
        digest = hashlib.sha256(value.numpy().tobytes()).hexdigest()
        lines.append(f"{name} F32 {list(value.shape)} {digest}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header as ``change`` leaves it, the data untouched."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def _cut(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated data": (
        lambda f: _cut(f, (f / "model.safetensors").stat().st_size - 1000),
        r"model\.safetensors: .*truncated: its header describes [\d,]+ bytes, the file has",
    ),
    "truncated header": (lambda f: _cut(f, 100), r"model\.safetensors: .*truncated: its header alone"),
    "empty file": (lambda f: _cut(f, 0), r"model\.safetensors: .*it holds 0 bytes"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 20),
        r"model\.safetensors: .*header of [\d,]+ bytes, the limit",
    ),
    "header is not JSON": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"{no json" + b"x" * 50),
        r"model\.safetensors: .*not JSON",
    ),
    "overlap": (
        lambda f: _header(f, lambda h: h[Q].update(data_offsets=h["lm_head.weight"]["data_offsets"], shape=[131, 48])),
        r"model\.safetensors: .*overlaps the tensor before it",
    ),
    "hole": (lambda f: _header(f, lambda h: h.pop(Q)), r"model\.safetensors: .*leaves a hole"),
    "bytes behind": (
        lambda f: (f / "model.safetensors").open("ab").write(b"more"),
        r"model\.safetensors: .*4 bytes follow the last tensor",
    ),
    "wrong size": (
        lambda f: _header(f, lambda h: h[Q].update(shape=[48, 47])),
        rf"model\.safetensors: .*{Q} of shape \[48, 47\]",
    ),
    "missing tensor": (lambda f: _tensors(f, lambda t: t.pop(Q)), rf"tensor {Q} is missing"),
    "unexpected tensor": (
        lambda f: _tensors(f, lambda t: t.update({"model.layers.1.moe.gate": torch.ones(2)})),
        r"tensor model\.layers\.1\.moe\.gate is unexpected",
    ),
    "mis-shaped tensor": (
        lambda f: _tensors(f, lambda t: t.update({Q: torch.ones(48, 12)})),
        rf"tensor {Q} has shape \[48, 12\], config\.json means \[48, 48\]",
    ),
    "vocabulary": (
        lambda f: edit_config(f, vocab_size=VOCABULARY + 1),
        r"tensor model\.embed_tokens\.weight has shape \[131, 48\], config\.json means \[132, 48\]",
    ),
    "quantised": (
        lambda f: _tensors(f, lambda t: t.update({Q: torch.ones(48, 48, dtype=torch.int8)})),
        rf"tensor {Q} has dtype I8; trainable weights are F32, F16, BF16",
    ),
    "float8": (
        lambda f: _tensors(f, lambda t: t.update({Q: torch.ones(48, 48).to(torch.float8_e4m3fn)})),
        rf"tensor {Q} has dtype F8_E4M3",
    ),
    "tying": (
        lambda f: _tensors(f, lambda t: t.pop("lm_head.weight")),
        r"tensor lm_head\.weight is missing",
    ),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: must hold a JSON object"),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(reference_model("llama"), tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    for file in pristine.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named(name: str, copy: Path) -> None:
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(InvalidModelError, match=message) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), NotFoundError, r"config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), NotFoundError, r"holds neither model\.safetensors nor"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            InvalidModelError,
            r"pytorch_model\.bin: pickled weights can run code",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../y.safetensors"}}'),
            InvalidModelError,
            r"weight_map must map tensors to file names beside it",
        ),
    ],
)
def test_absent_files_are_named(
    prepare: Callable[[Path], object], error: type[DPOError], message: str, copy: Path
) -> None:
    prepare(copy)
    with pytest.raises(error, match=message):
        load_model(copy)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_folder(reference_model("llama"), tmp_path, max_shard_size="60KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InvalidModelError, match=rf"{victim.name}: model\.safetensors\.index\.json names this file"):
        load_model(folder)


def test_a_tokenizer_with_more_ids_than_the_model() -> None:
    config = build_model_config()
    check_tokenizer(config, VOCABULARY - 1, "tok")
    with pytest.raises(InvalidModelError, match=r"tok: the tokenizer's largest id is 131, .*vocab_size is 131"):
        check_tokenizer(config, VOCABULARY, "tok")


def build_model_config() -> ModelConfig:
    return ModelConfig("llama", VOCABULARY, 48, 80, 3, 6, 2, 8)


def test_a_full_disk_is_named(pristine: Path, tmp_path: Path) -> None:
    """A limit on the size of files ends the write as a full disk or a quota does; nothing half-written stays."""
    model = load_model(pristine)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    try:
        with pytest.raises(NoSpaceError, match=str(tmp_path)):
            export(model, local_store(), str(pristine), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*model.safetensors*"))


def test_rows_are_read_as_slices(pristine: Path) -> None:
    """Only the asked bytes are read, each as one range."""
    store = Recorder(local_store())
    file = SafetensorsFile(store, str(pristine / "model.safetensors"))
    store.ranges.clear()
    info = file.tensors[Q]
    part = file.read(Q, (3, 10))
    assert torch.equal(part, load_file(pristine / "model.safetensors")[Q][3:10])
    assert store.ranges == [(info.start + 3 * 48 * 4, 7 * 48 * 4)]


class Recorder:
    """A store that records the ranges that are read."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.ranges: list[tuple[int, int | None]] = []

    def stat(self, uri: str) -> Any:
        return self.store.stat(uri)

    def read(self, source: str | ObjectInfo, start: int = 0, length: int | None = None) -> bytes:
        self.ranges.append((start, length))
        found: bytes = self.store.read(source, start, length)
        return found


def test_a_file_that_changes_while_being_read_is_an_error(copy: Path) -> None:
    file = SafetensorsFile(local_store(), str(copy / "model.safetensors"))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes() + b"x")
    with pytest.raises(DPOError, match="changed"):
        file.read(Q)
