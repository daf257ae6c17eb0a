"""What a run does for GPUs, as far as a machine without one can show it."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
from collections.abc import Iterator
from dataclasses import replace
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
from dpo_trainer.distributed import World
from dpo_trainer.model.attend import attend_by_piece
from dpo_trainer.model.varlen import pieces_of, plan_of
from dpo_trainer.waiting import LONGEST_WAIT_SECONDS


@pytest.fixture
def _cudnn() -> Iterator[None]:
    """torch's own choice of attention, before and afterwards."""
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)


@pytest.mark.usefixtures("_cudnn")
def test_cudnns_attention_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes a plan for each new length, and a pack has new ones."""
    groups: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _index: None)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_named: groups.append(backend))
    assert World.connect().device == torch.device("cuda", 0)
    assert groups == ["nccl"]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


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
