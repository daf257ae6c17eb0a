"""The rotary embedding's kernel, which Triton's interpreter runs here, against torch's operations."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
import pytest
import torch
from torch import Tensor

from dpo_testing.engines import tiny_engine
from dpo_testing.pairs import pack_of
from dpo_trainer.model import rotary
from dpo_trainer.model.forward import hidden_rows
from dpo_trainer.model.rotary import rotate, rotate_and_spread, rotation
from dpo_trainer.model.varlen import Piece, VarlenPlan, pieces_of, plan_of, spread

BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Of bf16: one rounding more in torch's form, of the sum of two copies' gradients."""


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(rotary, "computes", lambda _x: request.param)
    return bool(request.param)


def both(work: object, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """(result, gradient of x) with the kernels, and without."""
    found = []
    for has in (True, False):
        monkeypatch.setattr(rotary, "computes", lambda _x, has=has: has)
        out = work(x)  # type: ignore[operator]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
        found.append([out.detach(), *torch.autograd.grad(out, x, weight)])
    return found


def angles(rows: int, half: int) -> tuple[Tensor, Tensor]:
    return rotation(torch.arange(rows) * 3 % 17, torch.linspace(1.0, 0.01, half))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("heads", "width", "half"), [(1, 2, 1), (6, 16, 8), (3, 24, 12), (8, 64, 32), (3, 20, 3)])
def test_a_rotation(heads: int, width: int, half: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of a wider tensor, as queries are. Heads and channels need not be powers of two, nor turn all."""
    torch.manual_seed(0)
    wide = torch.randn(11, heads, width + 8).to(dtype).requires_grad_()
    cosines, sines = angles(11, half)
    ours, theirs = both(lambda x: rotate(x[..., 4 : 4 + width], cosines, sines), wide, monkeypatch)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=BOUND[dtype], atol=BOUND[dtype])


PLANS = {
    "two pairs": plan_of(pieces_of(pack_of(0, 1).segments, pack_of(0, 1).length), pack_of(0, 1).length),
    "unseen and thrice": plan_of(
        [Piece(2, 5, ((2, 5),)), Piece(5, 7, ((2, 4), (5, 7))), Piece(7, 9, ((2, 3), (7, 9)))], 12
    ),
}


@pytest.mark.parametrize("half", [6, 4])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_keys_are_turned_and_copied(
    plan: VarlenPlan, half: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    assert plan.gathers
    wide = torch.randn(len(plan.home), 3, 24).to(dtype).requires_grad_()
    cosines, sines = angles(len(plan.home), half)
    ours, theirs = both(lambda x: rotate_and_spread(x[..., 4:16], cosines, sines, plan), wide, monkeypatch)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=BOUND[dtype], atol=2 * BOUND[dtype])


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_the_order_of_copies(plan: VarlenPlan) -> None:
    for row in range(len(plan.home)):
        own = plan.copies[plan.starts[row] : plan.starts[row + 1]]
        assert own.tolist() == (plan.keys == row).nonzero().squeeze(1).tolist()


def test_without_copies_no_row_is_gathered(kernels: bool) -> None:
    plan = plan_of([Piece(0, 4, ((0, 4),))], 4)
    x, turns = torch.randn(4, 2, 8), angles(4, 4)
    assert torch.equal(rotate_and_spread(x, *turns, plan), spread(rotate(x, *turns), plan))
    assert torch.equal(rotate(x, *turns), rotary._turned(x, *turns, 1)), kernels


def test_a_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_engine() as engine:
        model = engine.model
        found = []
        for has in (True, False):
            monkeypatch.setattr(rotary, "computes", lambda _x, has=has: has)
            model.zero_grad()
            hidden = hidden_rows(model, pack_of(0, 1))
            hidden.square().sum().backward()
            found.append({"hidden": hidden.detach()} | {name: p.grad for name, p in model.named_parameters()})
        ours, theirs = found
        for name, mine in ours.items():
            if mine is not None:
                scale = float(theirs[name].abs().max())
                torch.testing.assert_close(mine, theirs[name], rtol=1e-5, atol=1e-5 * scale, msg=name)
