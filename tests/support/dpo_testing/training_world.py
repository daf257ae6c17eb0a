"""The little world that whole-run tests train in: a random Llama, its tokenizer, preferences of unlike lengths."""

import random
from pathlib import Path
from typing import Any

from dpo_testing.corpora import WORDS, llama_tokenizer, write_jsonl
from dpo_testing.models import reference_model, save_folder
from dpo_testing.runs import merged

VOCABULARY = 384
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
# transformers gives the padding token's embedding no gradient; id 0 is an ordinary token here.
NO_PADDING = {"pad_token_id": None}

LORA = {
    "lora": {"rank": 4, "alpha": 8, "targetModules": ["all"], "dropout": 0.1},
    "training": {"learningRate": 1e-2},
}
"""Merged into the spec of `make`: adapters everywhere, and a rate at which they learn as much as all weights do."""


def write_model(folder: Path, variant: str = "llama", **overrides: Any) -> Path:
    """A tiny model with every parameter random, and a tokenizer of its vocabulary."""
    save_folder(reference_model(variant, **{**SMALL, **HEADS, **NO_PADDING, **overrides}), folder)
    return llama_tokenizer(folder, VOCABULARY)


def preferences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs with prompts of 2 to 9 words and responses of 1 to 12, chosen and rejected unlike, rewards unequal."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [
        {
            "prompt": words(2, 9) + " ",
            "chosen_response": words(1, 12),
            "rejected_response": words(1, 12),
            "chosen_reward": round(draw.uniform(0.5, 2.0), 3),
            "rejected_reward": round(draw.uniform(-1.0, 0.5), 3),
        }
        for _ in range(count)
    ]


def make(folder: Path, *, pairs: int = 21, validation: int = 5, **overrides: Any) -> dict[str, Any]:
    """Write model/, train.jsonl and valid.jsonl; return a spec that trains on them until the loss has really fallen."""
    write_model(folder / "model", **overrides)
    write_jsonl(folder / "train.jsonl", preferences(pairs, seed=1))
    write_jsonl(folder / "valid.jsonl", preferences(validation, seed=2))
    return {
        "model": {"huggingFace": {"uri": str(folder / "model")}},
        "data": {
            "train": [{"uri": str(folder / "train.jsonl")}],
            "validation": [{"name": "held-out", "uri": str(folder / "valid.jsonl")}],
            "maxLength": 64,
            "boundary": "separate",
        },
        "training": {
            "globalBatchSize": 8,
            "dropLast": False,
            "maxSteps": 12,
            "learningRate": 2e-3,
            "schedule": {"warmupSteps": 0},
            "precision": "fp32",
            "packing": {"maxTokens": 256},
            "validationInterval": 3,
        },
        "checkpoint": {"everySteps": 4},
        "reference": {"cacheURI": str(folder / "reference")},
    }


__all__ = ["LORA", "make", "merged", "preferences", "write_model"]
