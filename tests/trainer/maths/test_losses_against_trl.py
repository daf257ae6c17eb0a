"""Each loss that TRL has too, against TRL's own functions: values, and gradients by every token's log-prob.

TRL is in an environment of its own, which is made the first time; see benchmarks/against_trl.py.
"""

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_api.spec import Dpo, Loss
from dpo_testing import loss_parity, papers
from dpo_testing.papers import SMOOTHING, PairOfResponses
from dpo_testing.runs import ROOT
from dpo_trainer import losses

pytestmark = pytest.mark.nightly

BETA = 0.3

NAMES = {
    Loss.DPO: "sigmoid", Loss.IPO: "ipo", Loss.ROBUST: "robust", Loss.HINGE: "hinge", Loss.EXO_PAIR: "exo_pair",
    Loss.NCA_PAIR: "nca_pair", Loss.BCO_PAIR: "bco_pair", Loss.APO_ZERO: "apo_zero", Loss.APO_DOWN: "apo_down",
    Loss.SIMPO: "simpo",
}  # fmt: skip
"""Our losses → TRL's. It has no reward-aware ones."""


def cases() -> dict[str, tuple[Dpo, dict[str, Any]]]:
    """Name → our settings and TRL's."""
    found: dict[str, tuple[Dpo, dict[str, Any]]] = {}
    for loss, name in NAMES.items():
        smoothing = SMOOTHING if loss.row.smooths and loss is not Loss.DPO else 0.0
        own: dict[str, Any] = {"loss": loss, "label_smoothing": smoothing, "average_log_probs": loss is Loss.IPO}
        theirs: dict[str, Any] = {"loss_type": [name], "label_smoothing": smoothing}
        if loss is Loss.SIMPO:
            own["simpo_gamma"] = theirs["simpo_gamma"] = 0.7
        found[name] = Dpo(beta=BETA, **own), theirs
    # TRL's sigmoid has no label smoothing any more. aot_unpaired, which has, is the same for a batch of one pair.
    smoothed = {"loss_type": ["aot_unpaired"], "label_smoothing": SMOOTHING}
    found["conservative DPO"] = Dpo(beta=BETA, label_smoothing=SMOOTHING), smoothed
    found["length-desensitised"] = Dpo(beta=BETA, ld_alpha=0.4), {"loss_type": ["sigmoid"], "ld_alpha": 0.4}
    mixture = [{"loss": "dpo", "weight": 0.8}, {"loss": "bco_pair", "weight": 0.2}]
    found["a mixture"] = (
        Dpo.model_validate({"beta": BETA, "losses": mixture}),
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    )
    return found


CASES = cases()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """TRL's losses and gradients of all cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        python = importlib.import_module("against_trl").environment_of_trl()
    usual = {"loss_weights": [1.0], "label_smoothing": 0.0, "ld_alpha": None, "beta": BETA, "pairs": pairs()}
    path: Path = tmp_path_factory.mktemp("trl") / "cases.json"
    path.write_text(json.dumps([usual | theirs for _, theirs in CASES.values()]))
    command = [str(python), str(ROOT / "benchmarks" / "peers" / "trl_losses.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


def pairs() -> list[dict[str, list[float]]]:
    fields = ("chosen", "rejected", "chosen_reference", "rejected_reference")
    return [{name: getattr(pair, name).tolist() for name in fields} for pair in papers.some_pairs()]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_trl(name: str, answers: dict[str, dict[str, Any]]) -> None:
    some: list[PairOfResponses] = papers.some_pairs()
    arguments, tails = loss_parity.desensitized_inputs(some, CASES[name][0])
    result = losses.pair_losses(*arguments, CASES[name][0], **tails)
    loss = result.total.mean()
    assert float(loss.detach()) == pytest.approx(answers[name]["loss"], rel=1e-6)
    tokens = [tensor for pair in some for tensor in (pair.chosen, pair.rejected)]
    ours = torch.autograd.grad(loss, tokens)
    theirs = [torch.tensor(part, dtype=torch.float64) for pair in answers[name]["gradients"] for part in pair]
    assert any(bool(gradient.any()) for gradient in ours)
    torch.testing.assert_close(ours, tuple(theirs), rtol=1e-6, atol=1e-9)


def test_every_loss_but_the_reward_aware_ones_is_compared() -> None:
    assert set(Loss) - set(NAMES) == {loss for loss in Loss if loss.row.needs_rewards}
