"""The checks that hold a losses module to the papers; the module is an argument, so that mutants take the same test."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo_api.spec import Dpo, Loss, LossPart
from dpo_testing import papers
from dpo_testing.papers import PairOfResponses, Settings, settings_of

SIDES = ("chosen", "rejected")
MIXTURE = (LossPart(loss=Loss.BCO_PAIR, weight=0.3), LossPart(loss=Loss.RPO_SQ, weight=1.4), LossPart(loss=Loss.DPO))


def settings_grid() -> Iterator[Settings]:
    """Each variant alone, averaged, and with each form of the SFT term; SFT alone in its three forms."""
    for loss in Loss:
        for average in (False, True):
            yield settings_of(loss, average_log_probs=average)
        yield settings_of(loss, preference_weight=0.6, sft_weight=0.8)
        yield settings_of(loss, sft_weight=0.8, average_log_probs=True)
        yield settings_of(loss, sft_weight=0.8, sft_average_log_probs=True)
        yield settings_of(loss, sft_weight=0.8, average_log_probs=True, sft_average_log_probs=False)
    yield Settings(losses=MIXTURE, label_smoothing=0.2)
    yield Settings(losses=MIXTURE, label_smoothing=0.2, preference_weight=0.6, sft_weight=0.8, average_log_probs=True)
    for alpha in (0.0, 0.4, 1.0):
        yield Settings(ld_alpha=alpha)
    yield Settings(loss="apo_zero", ld_alpha=0.4, sft_weight=0.8, preference_weight=0.6)
    yield Settings()  # without label smoothing
    yield Settings(loss="robust")
    yield Settings(loss="simpo")  # the default margin
    for sft_average in (None, False, True):
        yield Settings(preference_weight=0.0, sft_weight=0.7, sft_average_log_probs=sft_average)


def _columns(pairs: Sequence[PairOfResponses], name: str) -> Tensor:
    """[P, 2]: sums of ``chosen<name>`` and ``rejected<name>``, built so that gradients reach the tokens."""
    return torch.stack(
        [torch.stack((getattr(p, f"chosen{name}").sum(), getattr(p, f"rejected{name}").sum())) for p in pairs]
    )


def inputs(pairs: Sequence[PairOfResponses]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The trainer's arguments for these pairs: policy sums, counts, reference sums, rewards; [P, 2] each."""
    counts = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs])
    given = torch.tensor([[p.chosen_reward, p.rejected_reward] for p in pairs], dtype=torch.float64)
    return _columns(pairs, ""), counts, _columns(pairs, "_reference"), given


def desensitized_inputs(
    pairs: Sequence[PairOfResponses], settings: Dpo
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """``inputs``, and with ``ld_alpha`` the tails, by which the reference's sums are weighted as the trainer's are."""
    policy, counts, reference, given = inputs(pairs)
    if settings.ld_alpha is None:
        return (policy, counts, reference, given), {}

    def tails(name: str) -> Tensor:
        rows = []
        for pair in pairs:
            common = min(len(pair.chosen), len(pair.rejected))
            rows.append(torch.stack([getattr(pair, f"{side}{name}")[common:].sum() for side in SIDES]))
        return torch.stack(rows)

    weighted = reference - (1 - settings.ld_alpha) * tails("_reference")
    return (policy, counts, weighted, given), {"tails": tails("")}


def _agree(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(
        ours.double(), theirs, rtol=1e-10, atol=1e-12, msg=lambda text: f"{name}: trainer against paper: {text}"
    )


def check_losses(losses: ModuleType) -> None:
    """Values and token gradients of every setting, rewards, detachment, fillers; AssertionError at a difference."""
    for settings in settings_grid():
        check_setting(losses, settings)
    check_detached(losses)
    check_filler(losses)
    check_empty_response(losses)
    check_extreme(losses)


def check_setting(losses: ModuleType, settings: Settings) -> None:
    """One setting against the papers: the batch loss, its gradient at every token, the reported figures."""
    pairs = papers.some_pairs()
    tokens = [tensor for pair in pairs for tensor in (pair.chosen, pair.rejected)]
    expected = papers.batch_loss(settings, pairs)
    expected_gradients = torch.autograd.grad(expected, tokens, allow_unused=True, materialize_grads=True)
    arguments, tails = desensitized_inputs(pairs, settings)
    result = losses.pair_losses(*arguments, settings, **tails)
    loss = result.total.sum() / result.denominator.sum()
    label = f"{settings}"
    _agree(label, loss.detach(), expected.detach())
    assert loss.requires_grad, "the loss has no gradient"
    gradients = torch.autograd.grad(loss, tokens, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        _agree(f"gradient of {label}", ours, theirs)
    assert result.real.all()
    if settings.sft_weight == 0:
        assert result.sft is None, "an SFT term that does not exist is reported"
    else:
        _agree(f"sft of {label}", result.sft.sum() / result.denominator.sum(), papers.sft(settings, pairs).detach())
    if settings.preference_weight == 0:
        assert result.preference is None
        assert result.preference_at_start is None
        assert result.chosen_reward is None
        assert result.rejected_reward is None
        return
    each = torch.stack([papers.preference(settings, pair) for pair in pairs]).detach()
    _agree(f"preference of {label}", result.preference, each)
    if settings.needs_reference:
        starts = [papers.at_start(settings, pair.chosen_reward - pair.rejected_reward) for pair in pairs]
        expected_start = torch.tensor(starts, dtype=torch.float64)
        _agree(f"preference at the start of {label}", result.preference_at_start, expected_start)
    else:
        assert result.preference_at_start is None, "a loss without a reference has no known start"
        without = losses.pair_losses(*inputs(pairs)[:2], None, inputs(pairs)[3], settings)
        assert torch.equal(without.total, result.total), f"{label} reads the reference"
    for ours, theirs in zip(
        (result.chosen_reward, result.rejected_reward), papers.rewards(settings, pairs), strict=True
    ):
        _agree(f"reward of {label}", ours, theirs)


def check_detached(losses: ModuleType) -> None:
    """Reported figures carry no gradient; SFT alone needs no reference."""
    pairs = papers.some_pairs()
    policy, counts, reference, given = inputs(pairs)
    result = losses.pair_losses(policy, counts, reference, given, Settings(sft_weight=0.5))
    for name in ("preference", "preference_at_start", "sft", "chosen_reward", "rejected_reward"):
        assert not getattr(result, name).requires_grad, f"{name} carries a gradient"
    alone = losses.pair_losses(policy, counts, None, given, Settings(preference_weight=0.0, sft_weight=1.0))
    assert not alone.sft.requires_grad
    try:
        losses.pair_losses(policy, counts, None, given, Settings())
    except ValueError:
        return
    raise AssertionError("a preference loss without reference log-probabilities went through")


def check_filler(losses: ModuleType) -> None:
    """A filler pair, whatever it holds, changes nothing: not the loss, not a gradient, not a figure."""
    real = torch.tensor([True, False, True, True])
    for settings in (
        *(settings_of(loss, sft_weight=0.5) for loss in Loss),
        Settings(preference_weight=0.0, sft_weight=1.0),
        Settings(preference_weight=0.0, sft_weight=1.0, sft_average_log_probs=True),
    ):
        arguments = [tensor.detach().clone() for tensor in inputs(papers.some_pairs())]
        without = losses.pair_losses(*(tensor[real] for tensor in arguments), settings)
        for spoiled in (arguments[0], arguments[2], arguments[3]):
            spoiled[1] = torch.nan
        policy = arguments[0].requires_grad_()
        result = losses.pair_losses(*arguments, settings, real)
        (gradient,) = torch.autograd.grad(result.total.sum(), policy)
        assert bool(gradient.isfinite().all()), "a filler made a gradient NaN"
        assert not gradient[1].any(), "a filler has a gradient"
        assert int(result.denominator.sum()) == int(without.denominator.sum()), "a filler counts in the denominator"
        for name in ("total", "sft", "preference", "preference_at_start", "chosen_reward", "rejected_reward"):
            figure = getattr(result, name)
            if figure is not None:
                assert figure[1].item() == 0, f"a filler has {name} {figure[1]}"
                _agree(f"{name} beside a filler", figure[real].detach(), getattr(without, name).detach())


def check_empty_response(losses: ModuleType) -> None:
    """A response without tokens divides by one token, not by zero."""
    pairs = papers.some_pairs(lengths=((3, 0), (0, 2)))
    for settings in (Settings(average_log_probs=True, sft_weight=1.0), Settings(loss="ipo", average_log_probs=True)):
        result = losses.pair_losses(*inputs(pairs), settings)
        _agree("empty response", (result.total.sum() / 2).detach(), papers.batch_loss(settings, pairs).detach())


def check_extreme(losses: ModuleType) -> None:
    """In fp32, at |βΔ| and |g| up to 1e4: finite values and gradients, and equal to the limits known in closed form."""
    extremes = (-1e4, -50.0, 0.0, 50.0, 1e4)
    grid = torch.tensor([(x, gap) for x in extremes for gap in extremes])
    x, gap = grid[:, 0].clone().requires_grad_(), grid[:, 1]
    nothing = torch.zeros_like(gap)

    def of(loss: Loss, **others: Any) -> Tensor:
        of_chosen = losses.Terms(x / 0.5, nothing, gap)
        found: Tensor = losses.PREFERENCE_LOSSES[loss](of_chosen, settings_of(loss, beta=0.5, **others))
        return found

    for loss in Loss:
        for value in (of(loss), losses.PREFERENCE_LOSSES[loss](losses.Terms(nothing, x / 0.5, gap), settings_of(loss))):
            assert value.dtype == torch.float32
            (gradient,) = torch.autograd.grad(value.sum(), x)
            assert bool(value.isfinite().all()), f"{loss} is not finite"
            assert bool(gradient.isfinite().all()), f"{loss}'s gradient is not finite"
    exact = torch.clamp(-x.detach(), min=0)  # −log σ(x) → max(−x, 0)
    far = x.detach().abs() >= 50
    torch.testing.assert_close(of(Loss.DPO, label_smoothing=0.0).detach()[far], exact[far])
    assert not of(Loss.HINGE).detach()[x.detach() >= 50].any(), "the hinge is not flat beyond its margin"
    same = x.detach() == gap
    for loss in (Loss.RPO_SQ, Loss.RPO_BWD_KL, Loss.RPO_FWD_KL):
        value = of(loss).detach()
        assert not value[same].any(), f"{loss} is not zero where model and data agree"
        assert bool((value[~same] >= 0).all()), f"{loss} is negative"
