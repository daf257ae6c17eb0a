"""Wrong losses are caught: every sign, factor and detachment of losses.py is changed in turn, and a check must fail.

The text is edited in memory and executed; nothing on disk changes. A mutant that survives means that the
checks of test_losses.py prove less than they say.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dpo_testing import loss_parity
from dpo_trainer import losses

SOURCE = Path(losses.__file__).read_text(encoding="utf-8")

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}

EDITS = {
    "the rejected branch is detached": ("Terms(gains[:, 0], gains[:, 1],", "Terms(gains[:, 0], gains[:, 1].detach(),"),
    "the chosen branch is detached": ("Terms(gains[:, 0], gains[:, 1],", "Terms(gains[:, 0].detach(), gains[:, 1],"),
    "the gradient is halved": (
        "total = settings.preference_weight * preference",
        "total = settings.preference_weight * (0.5 * preference + 0.5 * preference.detach())",
    ),
    "the loss is halved": (
        "return _cross_entropy(dpo.beta * of.delta, dpo",
        "return 0.5 * _cross_entropy(dpo.beta * of.delta, dpo",
    ),
    "the rewards keep their gradient": ("rewarded.detach()", "rewarded"),
    "the rewards lose β": ("settings.beta * rewarded.detach()", "rewarded.detach()"),
    "SimPO's rewards are sums": ("gains / lengths if settings.rewards_are_means else gains", "gains"),
    "SimPO sums log-probs": ("if settings.averages:", "if settings.average_log_probs:"),
    "SFT beside SimPO sums log-probs": ("per_token = settings.averages", "per_token = settings.average_log_probs"),
    "SimPO measures against the reference": ("if settings.needs_reference:\n        if", "if True:\n        if"),
    "label smoothing is ignored": (
        "_cross_entropy(dpo.beta * of.delta, dpo.label_smoothing)",
        "_cross_entropy(dpo.beta * of.delta, 0.0)",
    ),
    "only the first loss of a mixture counts": ("sum(others, start=first)", "first"),
    "the weights of a mixture are ignored": ("(weight * PREFERENCE_LOSSES", "(PREFERENCE_LOSSES"),
    "length desensitising is ignored": ("return sums - (1 - settings.ld_alpha) * tails", "return sums"),
    "SFT is desensitised": ("_sft_term(policy[:, 0]", "_sft_term(desensitized(policy, tails, settings)[:, 0]"),
    "APO raises both responses": ("(dpo.beta * of.rejected).sigmoid()", "(-dpo.beta * of.rejected).sigmoid()"),
    "the hinge is leaky": ("return relu(1 - ", "return torch.nn.functional.leaky_relu(1 - "),
    "the rewards are exchanged": ("implicit[:, 0], implicit[:, 1]", "implicit[:, 1], implicit[:, 0]"),
    "both rewards are the chosen's": ("implicit[:, 0], implicit[:, 1]", "implicit[:, 0], implicit[:, 0]"),
    "SFT trains on the rejected response": ("_sft_term(policy[:, 0]", "_sft_term(policy[:, 1]"),
    "SFT divides by the rejected response's length": ("counts[:, 0], settings", "counts[:, 1], settings"),
    "SFT's gradient is lost": ("settings.sft_weight * sft\n", "settings.sft_weight * sft.detach()\n"),
    "the preference's gradient is lost": (
        "total = settings.preference_weight * preference\n",
        "total = settings.preference_weight * preference.detach()\n",
    ),
    "SFT follows the wrong default": (
        "per_token = settings.averages",
        "per_token = not settings.averages",
    ),
    "SFT alone averages over pairs": ("return -chosen, counts", "return -chosen, real.to(torch.int64)"),
    "the KLs are exchanged": (
        "return _bernoulli_kl(of.reward_gap, dpo.beta * of.delta)",
        "return _bernoulli_kl(dpo.beta * of.delta, of.reward_gap)",
    ),
    "every variant trains as dpo": ("PREFERENCE_LOSSES[loss](of", "PREFERENCE_LOSSES[Loss.DPO](of"),
    "the reward scale is ignored": ("gap = settings.gt_reward_scale * ", "gap = 1.0 * "),
    "a filler weighs as a pair": ("real.to(torch.int64)", "torch.ones_like(counts)"),
    "a filler's loss counts": ("preference = torch.where(real, ", "preference = torch.where(real | True, "),
    "the value at the start is that of now": ("Terms(equal, equal, gap)", "Terms(gains[:, 0].detach(), equal, gap)"),
    "the value at the start ignores the rewards": (
        "Terms(equal, equal, gap)",
        "Terms(equal, equal, equal)",
    ),
    "a filler's value at the start counts": (
        "at_start = torch.where(real, ",
        "at_start = torch.where(real | True, ",
    ),
    "a filler's NaN is multiplied, not masked": (
        "policy = torch.where(keep, policy_sums, 0.0)",
        "policy = policy_sums * keep",
    ),
    "the probabilities' logs are taken": (
        "return -(1 - smoothing) * logsigmoid(logit) -",
        "return -(1 - smoothing) * torch.log(torch.sigmoid(logit)) -",
    ),
    "the KL is of probabilities": (
        "heads = p_logit.sigmoid() * (logsigmoid(p_logit) - logsigmoid(q_logit))",
        "heads = p_logit.sigmoid() * (logsigmoid(p_logit) - torch.log(torch.sigmoid(q_logit)))",
    ),
    "an empty response divides by zero": ("lengths = counts.clamp(min=1)", "lengths = counts"),
    "SFT of an empty response divides by zero": ("chosen / counts.clamp(min=1)", "chosen / counts"),
}


def module_of(source: str) -> ModuleType:
    module = ModuleType("mutated_losses")
    exec(compile(source, "losses.py (mutated)", "exec"), module.__dict__)  # noqa: S102
    return module


def arithmetic_changes() -> Iterator[tuple[str, int]]:
    """Name each binary operator, which turns into its opposite, and each minus sign, which is dropped, and its node."""
    nodes = list(ast.walk(ast.parse(SOURCE)))
    annotations = {id(inner) for node in nodes for inner in _annotations(node)}
    for index, node in enumerate(nodes):
        before = ast.unparse(node) if id(node) not in annotations and isinstance(node, ast.BinOp | ast.UnaryOp) else ""
        if before and _change(node):
            yield f"line {node.lineno}: {before} -> {ast.unparse(node)}", index  # type: ignore[attr-defined]
            _change(node)


def _change(node: ast.AST) -> bool:
    """Change an operator, or change it back; False if there is nothing to change."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.USub()
    else:
        return False
    return True


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef) and node.returns is not None:
        yield from ast.walk(node.returns)
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield from ast.walk(node.annotation)


def assert_caught(mutated: str) -> None:
    try:
        loss_parity.check_losses(module_of(mutated))
    except AssertionError:
        return
    pytest.fail("the checks let this mutant through")


def test_the_module_itself_passes() -> None:
    loss_parity.check_losses(module_of(SOURCE))


@pytest.mark.parametrize("index", [pytest.param(index, id=name) for name, index in arithmetic_changes()])
def test_changed_arithmetic_is_caught(index: int) -> None:
    tree = ast.parse(SOURCE)
    assert _change(list(ast.walk(tree))[index])
    assert_caught(ast.unparse(tree))


ALWAYS = {
    "the rewards keep their gradient",
    "the rewards are exchanged",
    "SFT alone averages over pairs",
    "the KLs are exchanged",
    "every variant trains as dpo",
    "the reward scale is ignored",
    "a filler's loss counts",
    "a filler's NaN is multiplied, not masked",
    "the value at the start ignores the rewards",
}
"""No changed operator has the effect of these. They stay in `make test`, the rest runs in `make nightly`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.nightly) for name in EDITS]
)
def test_edit_is_caught(name: str) -> None:
    old, new = EDITS[name]
    assert SOURCE.count(old) >= 1, f"losses.py no longer holds {old!r}: bring this table up to date"
    assert_caught(SOURCE.replace(old, new, 1))
