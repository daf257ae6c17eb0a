"""Reads what a Hugging Face model folder says about itself, without loading a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_api.errors import DPOError, InvalidModelError, NotFoundError
from dpo_api.validation import ModelFacts
from dpo_store import Store, join_uri

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s that the trainer builds; a test holds them equal to the trainer's own."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_model_facts(store: Store, folder: str) -> ModelFacts:
    """Return what the folder's config.json says.

    Raises NotFoundError without one, InvalidModelError naming the key that is missing, wrong or not supported.
    """
    uri = join_uri(folder, "config.json")
    try:
        raw = json.loads(store.read(uri))
    except ValueError:
        raise InvalidModelError(f"{uri}: not JSON; copy the file again") from None
    if not isinstance(raw, dict):
        raise InvalidModelError(f"{uri}: not a JSON object; copy the file again")
    return facts_of(raw, uri)


def facts_of(raw: Mapping[str, Any], uri: str) -> ModelFacts:
    """Read a parsed config.json. Raises InvalidModelError. The trainer's own reader is stricter and comes later."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InvalidModelError(f"{uri}: model_type is {json.dumps(family)}; supported are {', '.join(FAMILIES)}")

    def positive(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise InvalidModelError(f"{uri}: {key} is missing; copy the model's original config.json")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidModelError(f"{uri}: {key} is {json.dumps(value)}: it must be a positive integer")
        return value

    heads = positive("num_attention_heads")
    # transformers' own values for configurations that leave the key out
    groups = {"llama": heads, "mistral": 8, "qwen2": 32, "qwen3": 32}[str(family)]
    return ModelFacts(
        layers=positive("num_hidden_layers"),
        heads=heads,
        kv_heads=positive("num_key_value_heads", groups),
        hidden=positive("hidden_size"),
        ffn=positive("intermediate_size"),
        vocab=positive("vocab_size"),
        max_positions=positive("max_position_embeddings", 4096),
        family=str(family),
    )


def weights_problem(folder: str, names: Sequence[str]) -> DPOError | None:
    """Say why the files of a model folder cannot be its weights; None if they can."""
    if any(name in names for name in WEIGHTS):
        return None
    pickled = next((name for name in PICKLED if name in names), None)
    if pickled is not None:
        return InvalidModelError(
            f"{join_uri(folder, pickled)}: pickled weights can run code and are not read;"
            " save the model again with safe_serialization=True"
        )
    return NotFoundError(f"{folder} holds neither {' nor '.join(WEIGHTS)}; is it a Hugging Face model folder?")


def tokenizer_problem(folder: str, names: Sequence[str]) -> DPOError | None:
    """Say that a folder has no tokenizer; None if it has one."""
    if any(name in names for name in VOCABULARIES):
        return None
    return NotFoundError(
        f"{folder} holds no tokenizer ({', '.join(VOCABULARIES)}); copy it there or set spec.tokenizer"
    )


def hub_hint(uri: str) -> str:
    """Return advice for an address that looks like a name on the Hugging Face Hub; empty otherwise."""
    if _HUB_NAME.fullmatch(uri) is None:
        return ""
    return f"; models are not fetched from the Hub by name: download it first (hf download {uri} --local-dir FOLDER)"
