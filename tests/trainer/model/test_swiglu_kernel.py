"""SwiGLU's kernel, which Triton's interpreter runs here, against torch's operations."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation

from dpo_trainer.kernels import swiglu
from dpo_trainer.model import activation
from dpo_trainer.model.activation import SwiGLU


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_swiglu_and_its_gradient(dtype: torch.dtype, bound: float, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu, "BLOCK", 64)
    monkeypatch.setattr(activation, "computes", lambda _x: True)
    torch.manual_seed(0)
    wide = torch.randn(3, 2, 2 * width + 4).to(dtype).mul_(3).requires_grad_()
    slope = torch.randn(3, 2, width).to(dtype)
    ours = SwiGLU(None)(wide[..., 4:])
    (found,) = torch.autograd.grad(ours, wide, slope)
    exact = wide.detach().double().requires_grad_()
    gate, up = exact[..., 4:].chunk(2, dim=-1)
    theirs = F.silu(gate) * up
    (expected,) = torch.autograd.grad(theirs, exact, slope.double())
    assert ours.dtype == found.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=bound, atol=bound)
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, by which the interpreter computes
def test_large_gates_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "computes", lambda _x: True)
    x = torch.tensor([[200.0, -200.0, 3.0, 3.0]], requires_grad=True)
    out = SwiGLU(None)(x)
    assert out.tolist() == [[600.0, 0.0]]
    (found,) = torch.autograd.grad(out.sum(), x)
    assert found.tolist() == [[3.0, 0.0, 200.0, 0.0]]


def test_nan_stays_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "computes", lambda _x: True)
    assert SwiGLU(None)(torch.tensor([[float("nan"), 1.0]])).isnan().all()
