"""What a run does for GPUs, as far as a machine without one can show it."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from dpo_testing.engines import tiny_engine
from dpo_testing.pairs import pack_of
from dpo_trainer import distributed
from dpo_trainer.checkpoint import files
from dpo_trainer.checkpoint.boxes import Box
from dpo_trainer.distributed import World
from dpo_trainer.model import build
from dpo_trainer.model.attend import attend_by_piece
from dpo_trainer.model.varlen import pieces_of, plan_of
from dpo_trainer.waiting import LONGEST_WAIT_SECONDS


@pytest.fixture
def _as_in_images() -> Iterator[None]:
    """torch's own choice of attention, and the fp32 products that NVIDIA's images choose."""
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)
    torch.set_float32_matmul_precision("high")
    yield
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_as_in_images")
def test_cudnns_attention_and_tf32_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN makes a plan for each new length, and a pack has new ones. TF32 has errors of 1e-3."""
    groups: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _index: None)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_named: groups.append(backend))
    assert World.connect().device == torch.device("cuda", 0)
    assert groups == ["nccl"]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def test_no_groups_are_made_that_only_checkpoints_of_megatron_core_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's connections need another network than NCCL's, which a node may not have."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **named: asked.update(named))
    monkeypatch.setattr(distributed, "model_parallel_cuda_manual_seed", lambda _seed: None)
    World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0)).divide()
    assert asked["create_gloo_process_groups"] is False


def test_one_process_asks_no_gpu_whether_to_stop() -> None:
    """Its tensor would be read when the GPU has done all that came before."""
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))
    assert world.any_of(True, False) == [True, False]


@pytest.mark.parametrize(("precision", "engine"), [("bf16", True), ("fp32", False)])
def test_transformer_engine_is_not_chosen_for_fp32(
    precision: Any, engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(build.bridge, "needed", lambda: False)
    assert build.use_transformer_engine("auto", precision) is engine
    assert build.use_transformer_engine("transformer_engine", precision)


def test_a_checkpoint_holds_no_copies_of_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would take another loader where there are GPUs. Each value is asked for when the last one is written."""
    asked: list[int] = []

    def values_of(place: int) -> Tensor:
        asked.append(place)
        return torch.full((3,), float(place))

    def pinned(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed.checkpoint.filesystem, "_OverlappingCpuLoader", pinned)
    boxes = [Box(f"box{n}", (0,), (3,), torch.empty(3)) for n in range(3)]
    assert len(files.write(tmp_path, 0, boxes, values_of)) == 3
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("window", [None, 5, 1000])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_call_has_what_only_the_quadratic_form_computes(
    dtype: torch.dtype, groups: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped heads are for the flash kernel alone, which has neither fp32 nor masks; the others need whole rows.

    Here no kernel is the flash one for GPUs, as for fp32 there. A mask is a tensor only where a window hides a key, and
    its rows begin at multiples of 8 values.
    """
    seen: list[tuple[Tensor, Tensor, Any, dict[str, Any]]] = []
    real = F.scaled_dot_product_attention

    def call(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Any, **named: Any) -> Tensor:
        assert value.shape == key.shape
        seen.append((query, key, attn_mask, named))
        return real(query, key, value, attn_mask=attn_mask, **named)

    # torch itself compares what is called with its own function.
    monkeypatch.setattr("dpo_trainer.model.attend.F", SimpleNamespace(scaled_dot_product_attention=call))
    pack = pack_of(0, 1)
    plan = plan_of(pieces_of(pack.segments, pack.length), pack.length)
    query, key, value = (
        torch.randn(rows, heads, 8, dtype=dtype, requires_grad=True)
        for rows, heads in ((pack.length, 4), (len(plan.keys), groups), (len(plan.keys), groups))
    )
    attend_by_piece(query, key, value, plan, window, None).sum().backward()
    real_pieces = [piece for piece in plan.pieces if not piece.padding]
    assert len(seen) == len(real_pieces)
    for piece, (q, k, mask, named) in zip(real_pieces, seen, strict=True):
        assert q.shape[1] == k.shape[1] == 4
        assert not named["enable_gqa"]
        if window is not None and window < piece.key_count:
            assert mask.stride(0) % 8 == 0
            assert mask.dtype == dtype
        else:
            assert isinstance(mask, CausalBias)
            assert mask.variant == CausalVariant.LOWER_RIGHT


def test_groups_of_ranks_wait_as_long_as_the_run() -> None:
    """Megatron-Core's own limit is 30 minutes."""
    with tiny_engine():
        for group in (parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()):
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout.total_seconds() == LONGEST_WAIT_SECONDS


def test_adam_is_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_engine() as engine:
        monkeypatch.setattr("dpo_trainer.engine.get_megatron_optimizer", without_gloo())
        engine.world = replace(engine.world, device=torch.device("cuda"))
        engine.prepare_training()
        parts = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
        groups = [group for part in parts for group in part.optimizer.param_groups]
        assert groups
        assert all(group["fused"] and not group["foreach"] for group in groups)


def without_gloo() -> Any:
    """Megatron-Core's function, without the groups for checkpoints that only a run on GPUs makes."""
    from dpo_trainer import engine

    real = engine.get_megatron_optimizer
    return lambda config, chunks, **_named: real(config, chunks, use_gloo_process_groups=False)
