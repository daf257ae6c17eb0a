"""The bridge: Megatron-Core's training, checkpoints and tensor parallelism without a GPU."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_testing.gloo import run_ranks
from dpo_testing.megatron_ranks import LORA, check_tensor_parallel, check_training, gradients, randomise_adapters
from dpo_testing.models import (
    load_model,
    local_store,
    reference_model,
    save_folder,
    single_process,
    token_stream,
)
from dpo_trainer import bridge
from dpo_trainer.formats.export import export
from dpo_trainer.model.lora import attach_lora, merged_value

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the bridge is never installed beside a GPU")


@pytest.fixture
def _world() -> Iterator[None]:
    with single_process():
        yield


@on_cpu
def test_install_is_idempotent_and_leaves_torch_alone() -> None:
    assert bridge.install()
    current = torch.cuda.current_device
    assert bridge.install()
    assert torch.cuda.current_device is current
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1, device="meta").device.type == "meta"
    assert not torch.cuda.is_available()


def test_beside_a_gpu_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bridge, "_installed", False)
    before = torch.cuda.current_device
    assert not bridge.install()
    assert torch.cuda.current_device is before
    with bridge.construction():
        assert torch.zeros(1).type() == "torch.FloatTensor"
    assert not bridge._installed


@on_cpu
def test_construction_maps_cuda_inside_and_only_inside() -> None:
    with bridge.construction():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).cuda().device.type == "cpu"
        assert torch.zeros(1).to("cuda").device.type == "cpu"
        assert torch.zeros(1).to(device="cuda", dtype=torch.float16).dtype == torch.float16
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


@on_cpu
@pytest.mark.usefixtures("_world")
def test_clipping_works_outside_construction_and_in_any_thread() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    bridge.install()
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    norms: list[Any] = []

    def clip() -> None:
        norms.append(
            float(get_grad_norm_fp32([parameter.grad], grad_stats_parallel_group=torch.distributed.group.WORLD))
        )
        clip_grad_by_total_norm_fp32([parameter], 1.5, norms[0])

    thread = threading.Thread(target=clip)
    thread.start()
    thread.join()
    assert norms == [6.0]
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.75))


@pytest.mark.slow
@pytest.mark.nightly  # whole runs of tests/distributed prove it through the entry point
@on_cpu
def test_two_processes_train_save_and_resume(tmp_path: Path) -> None:
    """Data parallel with the distributed optimizer, bf16 with fp32 masters, gloo."""
    folder = save_folder(reference_model("qwen3", dtype=torch.bfloat16), tmp_path / "model")
    (tmp_path / "checkpoint").mkdir()
    run_ranks(2, check_training, folder, tmp_path / "checkpoint")


@pytest.mark.slow
@pytest.mark.nightly  # whole runs of tests/distributed prove it through the entry point
@on_cpu
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.usefixtures("_world")
def test_tensor_parallel_ranks_hold_the_same_model(size: int, tmp_path: Path) -> None:
    """Slices, exports, LoRA's merged weights and gradients do not depend on the number of ranks.

    With 4 ranks the 2 key/value groups are cut across; the vocabulary and the MLP divide by 4.
    """
    shape = {"vocab_size": 132, "num_attention_heads": 8, "head_dim": 6}
    folders, whole = [], {}
    for variant in ("llama", "qwen2", "qwen3"):
        reference = reference_model(variant, **shape)
        folders.append(save_folder(reference, tmp_path / variant))
        with torch.no_grad():
            whole[variant] = reference(token_stream(25, seed=4)[None]).logits[0].contiguous()
    save_file(whole, tmp_path / "expected.safetensors")
    run_ranks(size, check_tensor_parallel, size, folders, tmp_path / "expected.safetensors", tmp_path / "out")
    for folder in folders:
        exported = load_file(tmp_path / "out" / folder.name / "model.safetensors")
        for name, tensor in load_file(folder / "model.safetensors").items():
            assert torch.equal(exported[name], tensor), name
        model = load_model(folder)
        attach_lora(model, LORA, seed=3)
        randomise_adapters(model)
        export(model, local_store(), str(folder), tmp_path / "merged", value_of=merged_value(model))
        merged = load_file(tmp_path / "out" / f"{folder.name}-merged" / "model.safetensors")
        for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
            assert (merged[name] - tensor).abs().max() <= 1e-5, name
        split = load_file(tmp_path / "out" / f"{folder.name}-gradients.safetensors")
        for name, tensor in gradients(model).items():
            assert (split[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max().clamp_min(1.0), name
