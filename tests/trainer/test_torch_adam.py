"""torch's Adam as the engine has it: one kernel for all parameters, which counts the updates on their device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_testing.engines import tiny_engine
from dpo_trainer.torch_adam import allocate, fuse


def optimizer_of(parameters: list[torch.Tensor]) -> Any:
    """As Megatron-Core has it: torch's Adam inside an optimizer of its own, one of several."""
    inner = torch.optim.AdamW([{"params": parameters, "weight_decay": 0.1}], lr=0.1)
    return SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner), SimpleNamespace(optimizer=None)])


def updated(*, fused: bool, step: int) -> list[torch.Tensor]:
    """Parameters after two updates that follow ``step`` others."""
    draw = torch.Generator().manual_seed(1)
    parameters = [torch.randn(size, generator=draw, requires_grad=True) for size in (5, 300)]
    optimizer = optimizer_of(parameters)
    inner = optimizer.chained_optimizers[0].optimizer
    if fused:
        fuse(optimizer)
    allocate(optimizer, step)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        inner.step()
    assert {float(inner.state[parameter]["step"]) for parameter in parameters} == {step + 2.0}
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("step", [0, 3])
def test_a_fused_update_is_the_same_update(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = updated(fused=False, step=step)
    calls: list[int] = []
    kernel = torch._fused_adamw_

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[0]))
        return kernel(*arguments, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    for one, other in zip(updated(fused=True, step=step), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert calls == [2, 2]  # all parameters at once, in each update


def test_the_fused_kernel_finds_its_count_on_the_device() -> None:
    parameters = [torch.empty(3, device="meta", requires_grad=True)]
    for fused, place in ((False, "cpu"), (True, "meta")):
        optimizer = optimizer_of(parameters)
        if fused:
            fuse(optimizer)
        allocate(optimizer, 4)
        (state,) = optimizer.chained_optimizers[0].optimizer.state.values()
        assert (state["step"].device.type, state["step"].dtype) == (place, torch.float32)


def test_the_engine_has_the_fused_kernel_on_a_cpu_too() -> None:
    with tiny_engine() as engine:
        engine.prepare_training()
        parts = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
        assert [group["fused"] for part in parts for group in part.optimizer.param_groups] == [True, True]
