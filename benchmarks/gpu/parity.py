"""Tiny models of four families against golden results of the CPU in fp32 (golden.json).

`python benchmarks/gpu_check.py --golden` writes those on a machine without a GPU. That its numbers are right is proven
by the tests, which compare them with transformers'.
"""

import json
from pathlib import Path
from typing import Any

import torch

from dpo_api.errors import InvalidSpecError
from dpo_api.models import ModelConfig
from dpo_trainer.distributed import World
from dpo_trainer.model.build import Backend, refuse_fp8, use_transformer_engine
from gpu.report import Report
from gpu.world import Lengths, Trained, alone, config_of, spec_of

GOLDEN = Path(__file__).with_name("golden.json")
STEPS, LORA_STEPS, SMALL_STEPS = 20, 6, 3
LENGTHS: list[Lengths] = [
    *((17, 9, 14), (3, 21, 1), (26, 1, 12), (1, 6, 5)),
    *((12, 12, 12), (40, 5, 9), (8, 30, 22), (2, 2, 3)),
]
BATCHES = ((0, 1, 2, 3), (4, 5, 6, 7))
PARITY, BF16, FP8 = 1e-5, 2e-2, 5e-2
LATER = 1e-4
"""For losses after two updates on a GPU: Adam's first updates have the size of the learning rate whatever the gradient
is, so that one near 0 which rounding turns moves all that follows."""

_SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 16.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {"rope_parameters": {**_ROPE, "original_max_position_embeddings": 32}, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": False}),
    "qwen3": ("Qwen3ForCausalLM", {"rope_parameters": {"rope_theta": 5e3}, "tie_word_embeddings": True}),
}


def run(report: Report, small: bool) -> None:
    """Compare this machine with the golden results."""
    golden = json.loads(GOLDEN.read_text())
    worst: dict[str, float] = {}
    with alone() as world:
        reason = no_fp8()
        report.add(fp8="checked" if reason is None else f"skipped: {reason}")
        for family in FAMILIES:
            right = golden[family]
            found = measure(family, world, SMALL_STEPS if small else STEPS, SMALL_STEPS if small else LORA_STEPS)
            for what, values in found.items():
                apart = [abs(got / right - 1) for got, right in zip(_flat(values), _flat(right[what]), strict=False)]
                exact, later = (apart[:2], apart[2:]) if what.endswith("losses") else (apart, [])
                worst[what] = _largest([worst.get(what, 0.0), *apart])
                report.within(f"{family}: {what}, relative to the golden ones,", _largest(exact), PARITY)
                if later:
                    bound = LATER if world.device.type == "cuda" else PARITY
                    report.within(f"{family}: later {what}, relative to the golden ones,", _largest(later), bound)
            other(report, family, world, torch.tensor(right["log_probs"], dtype=torch.float64), worst)
            report.add(worst=worst)


def measure(family: str, world: World, steps: int, lora_steps: int) -> dict[str, Any]:
    """Log-probs of the start model, losses of its training, and those of LoRA's."""
    trained = _model(family, world)
    table = trained.table(range(len(LENGTHS)))
    trained.engine.prepare_training()
    taken = [trained.step(BATCHES[step % 2], table, rate=1e-3) for step in range(steps)]
    adapted = _model(family, world, lora={"rank": 4, "alpha": 8, "targetModules": ["all"]})
    of_base = adapted.table(range(len(LENGTHS)))
    adapted.engine.prepare_training()
    return {
        "log_probs": table.sums.tolist(),
        "gradient_norm": [taken[0]["grad_norm"]],
        "losses": [values["loss"] for values in taken],
        "lora_losses": [adapted.step(BATCHES[step % 2], of_base, rate=1e-2)["loss"] for step in range(lora_steps)],
    }


def other(report: Report, family: str, world: World, golden: torch.Tensor, worst: dict[str, float]) -> None:
    """Prompts that are not shared, in fp32; and bf16 and FP8, whose rounding is what may differ."""
    forms: list[tuple[str, float, bool, dict[str, Any]]] = [
        ("unshared", PARITY, False, {}),
        ("bf16", BF16, True, {"precision": "bf16"}),
    ]
    if use_transformer_engine("auto", "bf16"):
        forms.append(("bf16 on Transformer Engine", BF16, True, {"precision": "bf16", "backend": "auto"}))
    if no_fp8() is None:
        eight = {"precision": "bf16", "backend": "auto", "transformerEngine": {"fp8": "hybrid"}}
        forms.append(("FP8", FP8, True, eight))
    for what, bound, share, choices in forms:
        trained = _model(family, world, **choices)
        trained.share = share
        off = float((trained.reference(range(len(LENGTHS))) / golden - 1).abs().max())
        worst[what] = max(worst.get(what, 0.0), off)
        report.within(f"{family}: log-probs {what}, relative to the golden ones,", off, bound)


def write_golden() -> None:
    """Compute the golden results here, on the CPU, and write them."""
    with alone() as world:
        assert world.device.type == "cpu", "golden results are made on a machine without a GPU"
        found = {family: measure(family, world, STEPS, LORA_STEPS) for family in FAMILIES}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {GOLDEN}, {GOLDEN.stat().st_size:,} bytes")


def no_fp8() -> str | None:
    """Why FP8 is not computed here; None if it is."""
    try:
        refuse_fp8("hybrid", "auto")
    except InvalidSpecError as error:
        return str(error)
    return None


def _model(family: str, world: World, precision: str = "fp32", backend: Backend = "local", **sections: Any) -> Trained:
    training = {"precision": precision, "packing": {"maxTokens": 192}, "weightDecay": 0.01}
    architecture, changes = FAMILIES[family]
    config: ModelConfig = config_of(architecture, model_type=family, **{**_SHAPE, **changes})
    return Trained.of(config, spec_of(training=training, **sections), world, LENGTHS, exact=True, backend=backend)


def _largest(values: list[float]) -> float:
    """NaN if one of them is."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _flat(values: list[Any]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).flatten().tolist()
