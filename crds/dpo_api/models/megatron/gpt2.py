"""GPT-2's tokenizer, which NeMo and Megatron-LM keep as a vocabulary and a list of merges, as tokenizer.json.

The two files do not say how a text is cut into words before the merges; tokenizer.json does. transformers would cut as
the model's family does, or refuse to load them.
"""

from __future__ import annotations

import json
from typing import Any

from dpo_api.errors import InvalidModelError

END = "<|endoftext|>"
"""GPT-2's only special token: the start, the end and the unknown."""
CONFIG = json.dumps(
    {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
    },
    indent=2,
).encode()
"""tokenizer_config.json."""
_VERSION = "#version"


def tokenizer_json(vocabulary: bytes, merges: bytes, where: str) -> bytes:
    """Return tokenizer.json: what transformers' GPT2TokenizerFast makes of ``vocab.json`` and ``merges.txt``.

    Raises InvalidModelError naming ``where`` and what is wrong with the files.
    """
    try:
        ids = json.loads(vocabulary)
        pairs = [line.removesuffix("\r").split(" ") for line in merges.decode().removesuffix("\n").split("\n")]
    except (ValueError, RecursionError) as error:
        raise _error(where, f"not a vocabulary in JSON with merges in UTF-8 ({error})") from None
    if not isinstance(ids, dict) or not ids or not all(_is_id(value) for value in ids.values()):
        raise _error(where, "the vocabulary must map each token to its id")
    if pairs[0][0].startswith(_VERSION):
        del pairs[0]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise _error(where, f"the merge {' '.join(pair)!r} is not one of two tokens of the vocabulary to a third")
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    found: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids.get(END, len(ids)),
                "content": END,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first],
            "pair": [first, second],
            "special_tokens": {},
        },
        "decoder": {**words, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": pairs,
        },
    }
    return json.dumps(found, ensure_ascii=False).encode()


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _error(where: str, why: str) -> InvalidModelError:
    return InvalidModelError(f"{where}: {why}; copy or download it again, or set spec.tokenizer.uri")
