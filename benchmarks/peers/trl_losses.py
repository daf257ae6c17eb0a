"""TRL's losses of given log-probs, in its own environment (benchmarks/against_trl.py makes it). Prints JSON.

python trl_losses.py CASES.json

Each case has the settings of a loss under TRL's names, and pairs: token log-probs of both responses under the policy
and under the reference. The answer to a case is the mean loss over its pairs, and its derivative by each of the
policy's.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

Pair = dict[str, list[float]]


def alone(value: Tensor) -> Tensor:
    """What gathering over processes gives where there is one."""
    return value


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=alone, gather_for_metrics=alone)


def dpo(case: dict[str, Any], chosen: Tensor, rejected: Tensor, pair: Pair) -> Tensor:
    """The loss of one pair by DPOTrainer; the model is only a table of log-probs."""
    trainer: Any = object.__new__(DPOTrainer)
    trainer.__dict__.update(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False, use_weighting=False,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=case["loss_type"],
        loss_weights=case["loss_weights"], beta=case["beta"], label_smoothing=case["label_smoothing"],
        ld_alpha=case["ld_alpha"], _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    longest = max(len(chosen), len(rejected))

    def rows(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in (one, other)])

    mask = torch.nn.functional.pad(rows(torch.ones(len(chosen)), torch.ones(len(rejected))), (1, 0))
    log_probs, nothing = rows(chosen, rejected), torch.zeros(2, longest)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    reference = [torch.tensor(pair[name], dtype=torch.float64) for name in ("chosen_reference", "rejected_reference")]
    if case["ld_alpha"] is None:
        sums = [part.sum() for part in reference]
    else:
        shared = min(map(len, reference))
        sums = [part[:shared].sum() + case["ld_alpha"] * part[shared:].sum() for part in reference]
    ids = torch.ones_like(mask, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask.long()}
    inputs |= {"ref_chosen_logps": sums[0][None], "ref_rejected_logps": sums[1][None]}
    loss: Tensor = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    return loss


def simpo(case: dict[str, Any], chosen: Tensor, rejected: Tensor) -> Tensor:
    """The loss of one pair by CPOTrainer, which has SimPO's."""
    settings = SimpleNamespace(
        alpha=0.0, beta=case["beta"], loss_type="simpo", simpo_gamma=case["simpo_gamma"],
        label_smoothing=case["label_smoothing"], accelerator=ACCELERATOR,
    )  # fmt: skip
    losses: Tensor = CPOTrainer.cpo_loss(settings, chosen.mean()[None], rejected.mean()[None])[0]  # type: ignore[arg-type]
    return losses.mean()


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """The loss of a case and its gradient."""
    total, gradients = 0.0, []
    for pair in case["pairs"]:
        tokens = [torch.tensor(pair[name], dtype=torch.float64, requires_grad=True) for name in ("chosen", "rejected")]
        loss = simpo(case, *tokens) if case["loss_type"] == ["simpo"] else dpo(case, tokens[0], tokens[1], pair)
        found = torch.autograd.grad(loss / len(case["pairs"]), tokens)
        gradients.append([gradient.tolist() for gradient in found])
        total += float(loss.detach()) / len(case["pairs"])
    return {"loss": total, "gradients": gradients}


print(json.dumps([answer(case) for case in json.loads(Path(sys.argv[1]).read_text())]))
