"""The norm, the rotation and the activation, which have backward passes of their own, against autograd."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from dpo_trainer.model.activation import GeGLU, SwiGLU
from dpo_trainer.model.norm import _RMSNorm
from dpo_trainer.model.rotary import rotate, rotation


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def saved(out: Tensor) -> int:
    """Bytes of what a function saved."""
    assert out.grad_fn is not None
    return sum(t.nbytes for t in out.grad_fn.saved_tensors)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "part of a wider tensor"])
def test_a_rotation_and_its_gradient(strided: bool) -> None:
    torch.manual_seed(0)
    wide = torch.randn(7, 3, 24, requires_grad=True)
    x = wide[..., 4:20] if strided else wide[..., :16].contiguous()
    cosines, sines = rotation(torch.tensor([0, 1, 2, 9, 3, 4, 5]), torch.tensor([1.0, 0.5, 0.1, 0.03, 0.01, 2, 3, 4]))
    ours, theirs = rotate(x, cosines, sines), rotated(x, cosines, sines)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    slope = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(out, wide, slope, retain_graph=True)[0] for out in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert saved(ours) == cosines.nbytes + sines.nbytes


def test_a_rotation_in_bf16_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 8).bfloat16().requires_grad_()
    cosines, sines = rotation(torch.arange(5), torch.tensor([1.0, 0.5, 0.1, 0.03]))
    out = rotate(x, cosines, sines)
    assert torch.equal(out, rotated(x.float(), cosines, sines).bfloat16())
    (found,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(found, rotated(torch.ones_like(x).float(), cosines, -sines).bfloat16())


@pytest.mark.parametrize(("module", "formula"), [(SwiGLU, swiglu), (GeGLU, geglu)], ids=["swiglu", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gated_activation_and_its_gradient(
    module: type[torch.nn.Module], formula: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 1, 20).to(dtype).requires_grad_()
    ours, theirs = module(None)(x), formula(x)
    assert torch.equal(ours, theirs)
    slope = torch.randn(9, 1, 10).to(dtype)
    found, expected = (torch.autograd.grad(out, x, slope, retain_graph=True)[0] for out in (ours, theirs))
    assert torch.equal(found, expected)
    assert saved(ours) == x.nbytes


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "rows apart"])
def test_a_norm_and_its_gradients(dtype: torch.dtype, apart: float, strided: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 2, 24, dtype=dtype)
    x = (x.transpose(0, 1) if strided else x).detach().requires_grad_()
    weight = torch.randn(24, dtype=dtype, requires_grad=True)
    ours, theirs = _RMSNorm.apply(x, weight, 1e-5, None), F.rms_norm(x, weight.shape, weight, 1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=apart)
    slope = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(out, (x, weight), slope, retain_graph=True) for out in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=apart, atol=apart)
    assert saved(ours) == x.nbytes + weight.nbytes + 18 * max(4, dtype.itemsize)
    (alone,) = torch.autograd.grad(_RMSNorm.apply(x, weight.detach(), 1e-5, None), x, slope)
    assert torch.equal(alone, found[0])
