"""The first update against transformers and the papers' formulas: loss, and the norm of the whole gradient."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, logsigmoid
from transformers import AutoModelForCausalLM

from dpo_api.loss import Loss
from dpo_api.manifest import parse_job
from dpo_api.progress import Progress
from dpo_testing.runs import Finished, merged, run_here, run_processes
from dpo_testing.training_world import make
from dpo_trainer.data.index.build import build_indexes
from dpo_trainer.run import Run
from dpo_trainer.sources import open_tokenizer, store_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("first-step")]

BETA, SCALE, SMOOTHING, GAMMA, PAIRS = 0.3, 0.7, 0.2, 0.4, 5
LOSSES = tuple(loss.value for loss in Loss)


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    base = make(world, pairs=PAIRS, validation=1)
    training = {"globalBatchSize": PAIRS, "maxSteps": 2, "validationInterval": 100, "gradientClip": 0.001}
    # The second step's figures depend on the first update, which the clip makes tiny but not zero.
    return merged(base, {"training": training, "dpo": {"beta": BETA, "gtRewardScale": SCALE}})


def pairs_of(spec: dict[str, Any]) -> list[tuple[list[int], list[int], list[int], float]]:
    """(prompt, chosen, rejected, reward gap) of every pair, as the trainer tokenised them."""
    job = parse_job(
        {"apiVersion": "dpo-operator.dev/v1alpha1", "kind": "DPOJob", "metadata": {"name": "x"}, "spec": spec}
    )
    index = build_indexes(job.spec, open_tokenizer(job.spec), lambda s: store_for(job.spec, s.storage)).train
    rows = [json.loads(line) for line in Path(spec["data"]["train"][0]["uri"]).read_text().splitlines()]
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    return [(*(part.tolist() for part in index.tokens(i)), gaps[i]) for i in range(index.n)]  # type: ignore[misc]


def log_prob(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log π of each token of a response, one sequence by itself through transformers; [n]."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return log_softmax(logits.double(), -1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def expected_loss(name: str, good: torch.Tensor, bad: torch.Tensor, gap: float) -> torch.Tensor:
    """The losses as the papers write them, of the log-ratios of a pair; simpo's are means of log-probs."""
    won, lost = BETA * good, BETA * bad
    scaled, truth = won - lost, torch.tensor([SCALE * gap], dtype=torch.float64)
    noisy = SMOOTHING if Loss(name).row.smooths else 0.0
    by_formula: dict[str, Callable[[], torch.Tensor]] = {
        # Rafailov et al. 2023, eq. 7, with the label smoothing of Mitchell 2023
        "dpo": lambda: -(1 - noisy) * logsigmoid(scaled) - noisy * logsigmoid(-scaled),
        "ipo": lambda: (good - bad - 0.5 / BETA) ** 2,  # Azar et al. 2023, eq. 17
        "rpo_sq": lambda: (scaled - truth[0]) ** 2,
        "rpo_bwd_kl": lambda: kl_div(_both(scaled).log(), _both(truth[0]), reduction="sum"),
        "rpo_fwd_kl": lambda: kl_div(_both(truth[0]).log(), _both(scaled), reduction="sum"),
        # Chowdhury et al. 2024
        "robust": lambda: (noisy * logsigmoid(-scaled) - (1 - noisy) * logsigmoid(scaled)) / (1 - 2 * noisy),
        "hinge": lambda: (1 - scaled).clamp(min=0),  # Liu et al. 2023
        "exo_pair": lambda: kl_div(  # Ji et al. 2024, eq. 16
            torch.tensor([1 - noisy, noisy], dtype=torch.float64).log(), _both(scaled), reduction="sum"
        ),
        "nca_pair": lambda: -logsigmoid(won) - logsigmoid(-won) / 2 - logsigmoid(-lost) / 2,  # Chen et al. 2024
        "bco_pair": lambda: -logsigmoid(won) - logsigmoid(-lost),  # Jung et al. 2024, without a shift
        "apo_zero": lambda: 1 - won.sigmoid() + lost.sigmoid(),  # D'Oosterlinck et al. 2024, eq. 7 and 8
        "apo_down": lambda: won.sigmoid() + 1 - scaled.sigmoid(),
        # Meng et al. 2024
        "simpo": lambda: -(1 - noisy) * logsigmoid(scaled - GAMMA) - noisy * logsigmoid(GAMMA - scaled),
    }
    return by_formula[name]()


def _both(logit: torch.Tensor) -> torch.Tensor:
    """The probabilities of both outcomes."""
    return torch.stack([logit, -logit]).sigmoid()


def settings_of(name: str) -> dict[str, Any]:
    """The section of a loss, with its own fields."""
    own: dict[str, Any] = {"labelSmoothing": SMOOTHING} if Loss(name).row.smooths else {}
    return {"loss": name, **own, **({"simpoGamma": GAMMA} if name == "simpo" else {})}


def independent(spec: dict[str, Any], name: str, sft_weight: float, ld_alpha: float = 1.0) -> tuple[float, float]:
    """Mean loss of the first batch and the norm of its gradient, without any of the trainer's numerical code."""
    model = AutoModelForCausalLM.from_pretrained(spec["model"]["huggingFace"]["uri"], attn_implementation="eager")
    model.train(False)
    total = torch.zeros((), dtype=torch.float64)
    pairs = pairs_of(spec)
    for prompt, chosen, rejected, gap in pairs:
        tokens = [log_prob(model, prompt, response) for response in (chosen, rejected)]
        common, full = min(len(chosen), len(rejected)), tokens[0].sum()
        good, bad = (part[:common].sum() + ld_alpha * part[common:].sum() for part in tokens)
        if name == "simpo":
            good, bad = good / len(chosen), bad / len(rejected)
            total = total + expected_loss(name, good, bad, gap) - sft_weight * good
        else:
            total = total + expected_loss(name, good - good.detach(), bad - bad.detach(), gap) - sft_weight * full
    loss = total / len(pairs)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), math.sqrt(sum(float((g * g).sum()) for g in grads))


def check(run: Finished, loss: float, norm: float) -> None:
    assert run.series("train/loss")[0] == pytest.approx(loss, rel=1e-5)
    assert run.series("train/grad_norm")[0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_of_each_variant(name: str, spec: dict[str, Any], world: Path) -> None:
    said: list[Progress] = []

    def keep(run: Run) -> None:
        assert run.reporter._hub is not None
        said.append(run.reporter._hub.progress.newest)
        assert (run.training.inputs.train.reference is None) is (name == "simpo")

    cache = world / f"reference of {name}"
    settings = {"dpo": {**settings_of(name), "sftWeight": 0.25}, "reference": {"cacheURI": str(cache)}}
    run = run_here(merged(spec, settings), world / name, keep)
    check(run, *independent(spec, name, 0.25))
    assert cache.exists() is (name != "simpo"), "simpo needs no reference, and none is computed"
    if name == "simpo":
        assert said[0].expected_first_preference_loss is None
        return
    # What the operator compares, and the same by hand.
    gaps = [gap for _, _, _, gap in pairs_of(spec)]
    zero = torch.zeros((), dtype=torch.float64)
    expected = sum(float(expected_loss(name, zero, zero, gap)) for gap in gaps) / len(gaps)
    assert said[0].expected_first_preference_loss == pytest.approx(expected, rel=1e-6)  # rewards are fp32
    assert said[0].first_preference_loss == pytest.approx(expected, rel=1e-5)


def test_two_processes_divide_once(spec: dict[str, Any], world: Path) -> None:
    """Five pairs on two ranks: a mean of per-rank means, or a second division, would show in both figures."""
    changed = merged(spec, {"training": {"microBatchSize": 1}, "dpo": {"loss": "rpo_sq"}})
    run = run_processes(changed, world / "two", processes=2, scratch=world / "scratch")
    check(run, *independent(spec, "rpo_sq", 0.0))


@pytest.mark.parametrize("parallelism", [{}, {"context": 2}], ids=["one process", "two share the tokens"])
def test_tokens_beyond_the_shorter_response_have_their_weight(
    parallelism: dict[str, int], spec: dict[str, Any], world: Path
) -> None:
    """In the reference too: the first loss would be another than ln 2."""
    changed = merged(
        spec, {"dpo": {**settings_of("dpo"), "ldAlpha": 0.3, "sftWeight": 0.25}, "parallelism": parallelism}
    )
    processes = 2 if parallelism else 1
    folder = world / f"desensitised {processes}"
    run = run_processes(changed, folder, processes=processes, scratch=world / f"scratch {processes}")
    check(run, *independent(spec, "dpo", 0.25, ld_alpha=0.3))
    assert run.series("train/preference_loss")[0] == pytest.approx(math.log(2), rel=1e-5)
