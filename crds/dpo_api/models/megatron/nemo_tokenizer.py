"""The tokenizer of a .nemo archive: which of its members it is, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dpo_api.errors import InvalidModelError
from dpo_api.models.folder import OWN_TOKENIZER, VOCABULARIES
from dpo_api.models.keys import Keys
from dpo_api.models.megatron import gpt2
from dpo_api.models.megatron.members import Extent
from dpo_api.models.megatron.presented import TOKENIZER_FILES, Companion

GPT2 = "GPT2BPETokenizer"
"""Megatron-LM's and NeMo's name of GPT-2's tokenizer."""
_GPT2 = {
    "megatron": (GPT2, "megatron-gpt-345m"),
    "huggingface": tuple(
        f"{owner}gpt2{size}" for owner in ("", "openai-community/") for size in ("", "-medium", "-large", "-xl")
    ),
}
"""Library → the values of ``tokenizer.type`` for which NeMo reads two files as GPT-2's tokenizer."""
_FIX = "set spec.tokenizer.uri to a folder with its files"


def find(
    settings: object, members: Mapping[str, Extent], where: str, contents: Callable[[str, Extent], bytes]
) -> dict[str, Companion]:
    """Return the files of the tokenizer that the ``tokenizer`` section of model_config.yaml describes.

    where: the file's address, for errors. contents: reads a member that has a name.
    Raises InvalidModelError naming the setting that is not read, or whose member is absent.
    """
    if not isinstance(settings, Mapping):
        raise Keys({}, where).error("tokenizer", settings, f"it says nothing about the tokenizer; {_FIX}")
    keys = Keys({f"tokenizer.{key}": value for key, value in settings.items()}, where)

    def member(*names: str) -> Extent:
        given = {f"tokenizer.{name}": value for name in names if (value := keys.get(f"tokenizer.{name}"))}
        found = next((members[own] for value in given.values() if (own := _member(value)) in members), None)
        if found is None:
            name, value = next(iter(given.items()), (f"tokenizer.{names[0]}", None))
            raise keys.error(name, value, f"it holds no such file; {_FIX}")
        return found

    library, kind = keys.get("tokenizer.library"), keys.get("tokenizer.type")
    if library == "sentencepiece":
        return {"tokenizer.model": member("model", "tokenizer_model")}
    inside = _folder(kind, members) if library == "huggingface" else {}
    if inside:
        return {**inside}
    if kind in _GPT2.get(str(library), ()) and (library == "megatron" or keys.get("tokenizer.merge_file")):
        if keys.get("tokenizer.special_tokens"):
            special = keys.get("tokenizer.special_tokens")
            raise keys.error("tokenizer.special_tokens", special, f"only GPT-2's own token is read; {_FIX}")
        parts = {"vocab.json": member("vocab_file"), "merges.txt": member("merge_file")}
        return gpt2_files(parts, where, contents)
    if library == "huggingface":
        raise keys.error("tokenizer.type", kind, f"a tokenizer's name on a hub, and nothing is downloaded; {_FIX}")
    if library == "megatron":
        raise keys.error("tokenizer.type", kind, f"of this library only {GPT2} is read; {_FIX}")
    raise keys.error("tokenizer.library", library, f"read are sentencepiece, megatron and huggingface; {_FIX}")


def check_family(found: Mapping[str, Companion], family: str, where: str) -> None:
    """Raise InvalidModelError for a tokenizer of GPT-2 in a model whose family has one tokenizer only."""
    if family in OWN_TOKENIZER and callable(found.get("tokenizer.json")):
        raise InvalidModelError(
            f"{where}: its tokenizer is GPT-2's, and the model is one of the family {family}, for which transformers"
            " reads every tokenizer as the family's own; set spec.tokenizer.uri to a folder with its tokenizer.json and"
            " no config.json, and load the tokenizer of the result with PreTrainedTokenizerFast"
        )


def gpt2_files(
    parts: Mapping[str, Extent], where: str, contents: Callable[[str, Extent], bytes]
) -> dict[str, Companion]:
    """Return vocab.json and merges.txt with the files that say that they are GPT-2's."""

    def made() -> bytes:
        vocabulary, merges = (contents(name, parts[name]) for name in ("vocab.json", "merges.txt"))
        return gpt2.tokenizer_json(vocabulary, merges, where)

    return {**parts, "tokenizer.json": made, "tokenizer_config.json": partial(bytes, gpt2.CONFIG)}


def _member(value: object) -> str:
    """Return the name of the member that a setting names: ``nemo:MEMBER``, or a path of which it is the last part."""
    text = str(value)
    return text.removeprefix("nemo:").removeprefix("./") if text.startswith("nemo:") else text.rpartition("/")[2]


def _folder(value: Any, members: Mapping[str, Extent]) -> dict[str, Extent]:
    """Return the tokenizer's files in the folder of the archive that a setting names, if it has a vocabulary."""
    folder = _member(str(value).rstrip("/")) + "/"
    found = {name: members[folder + name] for name in TOKENIZER_FILES if folder + name in members}
    return found if set(VOCABULARIES).intersection(found) else {}
