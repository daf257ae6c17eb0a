"""`python -m dpo_testing.transformer_engine_run VERSION`: training steps on Transformer Engine's linear layers.

They are the substitute's, on the CPU (dpo_testing.transformer_engine). Prints one JSON object: for each case the losses
and the gradient's norms of a few steps, and the log-probs of the start model; and the names that were called.
"""

import json
import sys
from typing import Any

from dpo_testing import transformer_engine

STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "local": {"backend": "local"},
    "transformer engine": {},
    "local, LoRA": {"backend": "local", "lora": True},
    "transformer engine, LoRA": {"lora": True},
    "local, bf16": {"backend": "local", "precision": "bf16"},
    "bf16": {"precision": "bf16"},
    "hybrid": {"precision": "bf16", "fp8": "hybrid"},
    "hybrid, LoRA": {"precision": "bf16", "fp8": "hybrid", "lora": True},
    "hybrid, selective": {"precision": "bf16", "fp8": "hybrid", "recomputation": "selective"},
    "hybrid, full": {"precision": "bf16", "fp8": "hybrid", "recomputation": "full"},
    "e4m3": {"precision": "bf16", "fp8": "e4m3"},
}


def run(**choices: Any) -> dict[str, list[float]]:
    """Train a few steps of two packs each."""
    import numpy as np
    import torch

    from dpo_testing.engines import tiny_engine
    from dpo_testing.pairs import pack_of
    from dpo_trainer.reference import ReferenceTable

    with tiny_engine(**{"backend": "transformer_engine", **choices}) as engine:
        pairs, packs = np.arange(4), [pack_of(0, 1), pack_of(2, 3)]
        table = ReferenceTable.empty(4)
        table.sums[:] = engine.log_prob_sums(pairs, packs)
        engine.prepare_training()
        found: dict[str, list[float]] = {"log_probs": table.sums.flatten().tolist(), "losses": [], "norms": []}
        for step in range(STEPS):
            values, _ = engine.train_step(
                pairs,
                packs,
                lambda ids: table.of(ids.cpu()),
                lambda ids: torch.zeros(len(ids), 2, dtype=torch.float64),
                rate=1e-2,
                seed=step,
            )
            found["losses"].append(values["loss"])
            found["norms"].append(values["grad_norm"])
        return found


def main() -> None:
    """Run all cases of the version that the command names, and print them."""
    transformer_engine.install(sys.argv[1])  # before any module that imports Megatron-Core

    import dpo_trainer.startup  # noqa: F401 - the first of them

    # isort: split
    from dpo_trainer.model import again, build

    # Where Transformer Engine is used at all: there is no GPU here.
    build.use_transformer_engine = lambda backend, precision: backend != "local"  # noqa: ARG005 - the real one's names
    again.DEVICES = frozenset()  # nor is there anywhere what CPUs alone do
    results = {name: run(**choices) for name, choices in CASES.items()}
    json.dump({"cases": results, "calls": sorted(transformer_engine.calls)}, sys.stdout)


if __name__ == "__main__":
    main()
