"""A tokenizer as NeMo has it: a SentencePiece model, or GPT-2's vocabulary with merges."""

import hashlib
import json
from typing import Any

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.models.folder import OWN_TOKENIZER
from dpo_api.models.megatron import gpt2
from dpo_api.models.megatron.nemo_tokenizer import GPT2
from dpo_store import join_uri
from dpo_trainer.convert.whole import Whole


def settings_of(source: Whole) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the ``tokenizer`` section of model_config.yaml, and the files that it names."""
    model = _file(source, "tokenizer.model")
    if model is not None:
        name = _named("tokenizer.model", model)
        settings = {"library": "sentencepiece", "type": None, "sentencepiece_legacy": False}
        return {**settings, "model": f"nemo:{name}", "tokenizer_model": f"nemo:{name}"}, {name: model}
    vocabulary, merges = _file(source, "vocab.json"), _file(source, "merges.txt")
    if vocabulary is not None and merges is not None and _is_gpt2(source, vocabulary, merges):
        first, second = _named("vocab.json", vocabulary), _named("merges.txt", merges)
        settings = {"library": "megatron", "type": GPT2}
        settings |= {"vocab_file": f"nemo:{first}", "merge_file": f"nemo:{second}"}
        return settings, {first: vocabulary, second: merges}
    return {"library": "huggingface", "type": None}, {}


def _is_gpt2(source: Whole, vocabulary: bytes, merges: bytes) -> bool:
    """Whether the model's tokenizer is what NeMo makes of the two files: those of Qwen2 cut texts into other words."""
    if source.config.family in OWN_TOKENIZER:
        return False
    written = _file(source, "tokenizer.json")
    if written is None:
        settings = json.loads(_file(source, "tokenizer_config.json") or b"{}")
        return str(settings.get("tokenizer_class")).removesuffix("Fast") == "GPT2Tokenizer"
    try:
        ours = gpt2.tokenizer_json(vocabulary, merges, source.uri)
    except InvalidModelError:
        return False
    return _computed(written) == _computed(ours)


def _computed(data: bytes) -> dict[str, Any]:
    """Return what of a tokenizer.json decides about tokens."""
    from tokenizers import Tokenizer  # every worker imports this module, and few of them need it

    found = json.loads(Tokenizer.from_buffer(data).to_str())
    words, model = found["pre_tokenizer"] or {}, found["model"]
    return {
        "normalizer": found["normalizer"],
        "words": {key: words.get(key) for key in ("type", "add_prefix_space", "use_regex")},
        "model": {key: model.get(key) or None for key in ("type", "ignore_merges", "dropout", "merges")},
        "affixes": [model.get(key) or None for key in ("continuing_subword_prefix", "end_of_word_suffix")],
        "added": [(token["id"], token["content"]) for token in found["added_tokens"]],
        "vocabulary": model.get("vocab"),
    }


def _file(source: Whole, name: str) -> bytes | None:
    try:
        return source.files.read(join_uri(source.uri, name))
    except NotFoundError:
        return None


def _named(name: str, data: bytes) -> str:
    return f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}_{name}"
