"""The norm and the clipping of gradients that Megatron-Core is given where no library has kernels for it."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.optimizer import clip_grads
from torch import Tensor

from dpo_testing.models import single_process
from dpo_trainer import clipping


@pytest.fixture
def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in ((7, 5), (300,), (1,), (64, 33))]


@pytest.fixture(autouse=True)
def _used() -> Iterator[None]:
    with single_process():
        clipping.use()
        yield


def test_megatron_core_takes_the_norm_of_all_gradients(gradients: list[Tensor]) -> None:
    found = clip_grads.get_grad_norm_fp32(gradients)
    whole = torch.cat([g.double().flatten() for g in gradients]).norm()
    assert float(found) == pytest.approx(float(whole), rel=1e-6)


def test_a_value_that_is_not_finite_shows_in_the_norm(gradients: list[Tensor]) -> None:
    gradients[2][0] = torch.nan
    assert clip_grads.get_grad_norm_fp32(gradients) != clip_grads.get_grad_norm_fp32(gradients)


def test_gradients_are_scaled_in_place(gradients: list[Tensor]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    places = [p.grad.data_ptr() for p in parameters if p.grad is not None]
    clip_grads.clip_grad_by_total_norm_fp32(parameters, 1.0, 4.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 4, rtol=1e-6, atol=0)
    assert [p.grad.data_ptr() for p in parameters if p.grad is not None] == places


def test_a_small_gradient_is_not_clipped(gradients: list[Tensor]) -> None:
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    parameter.grad = gradients[0].clone()
    clip_grads.clip_grad_by_total_norm_fp32([parameter], 1.0, 0.5)
    assert torch.equal(parameter.grad, gradients[0])


def test_the_host_reads_no_norm_of_a_single_gradient(gradients: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would wait for each. Meta tensors have no values that could be read."""
    found, _ = clipping.norm(0, torch.empty(0), [[g.to("meta") for g in gradients]], _of_each=False)
    assert found.shape == (1,)
    assert found.dtype == torch.float32
