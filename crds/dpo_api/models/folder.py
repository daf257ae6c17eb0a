"""The files of a Hugging Face model folder: config.json, weights and tokenizer. Weights are never unpickled."""

from __future__ import annotations

import builtins  # `list` is a method here
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.models.config import ModelConfig
from dpo_api.models.reader import parse_config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
QUANTISED = ("quant_config.json", "quantize_config.json")
"""Files of older AWQ and GPTQ folders, whose config.json does not say that the weights are quantised."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that each make a folder one with a tokenizer."""
OWN_TOKENIZER = frozenset({"qwen2"})
"""Families of which transformers reads every tokenizer as the family's own, whatever tokenizer_config.json says."""
_AT_ONCE = 8


class Objects(Protocol):
    """The part of dpo_store.Store that reads objects. It must be safe for threads."""

    def read(self, source: Any, start: int = 0, length: int | None = None) -> bytes:
        """Return ``length`` bytes from ``start``, all by default, of an object by its address or its description.

        NotFoundError if it is absent.
        """

    def stat(self, uri: str) -> Any:
        """Describe an object by ``uri``, ``size`` and ``etag``; NotFoundError if it is absent."""


class Files(Objects, Protocol):
    """The same for folders."""

    def list(self, folder: str) -> Iterator[Any]:
        """Describe every object below a folder."""

    def children(self, folder: str) -> builtins.list[str]:
        """Return the names in a folder, those of folders with ``/`` at the end."""


class Archives(Files, Protocol):
    """The same for archives that are compressed."""

    def decompressed(self, info: Any) -> Any:
        """Describe a decompressed copy of a gzip object, which is made if there is none on this node."""


def read_config(files: Objects, folder: str) -> ModelConfig:
    """Read the folder's config.json.

    Raises NotFoundError if there is none, InvalidModelError naming the key that is wrong or not supported, or the file
    that says that the weights are quantised.
    """
    uri = file_in(folder, "config.json")
    config = parse_config(read_json(files, uri), uri)
    for name in QUANTISED:
        if exists(files, file_in(folder, name)):
            raise InvalidModelError(
                f"{file_in(folder, name)}: quantised weights cannot be trained; use the original model"
            )
    return config


def read_json(files: Objects, uri: str) -> dict[str, Any]:
    """Read a JSON object. Raises InvalidModelError if the file holds anything else."""
    try:
        value = json.loads(files.read(uri))
    except (ValueError, RecursionError) as error:
        raise InvalidModelError(f"{uri}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise InvalidModelError(f"{uri}: must hold a JSON object; copy the file again")
    return value


def read_weight_map(files: Objects, folder: str) -> dict[str, str] | None:
    """Return which file holds each tensor, from the folder's index; None if the weights are one file, ``SINGLE``.

    Raises NotFoundError if the folder has no weights, InvalidModelError for a damaged index and for pickled weights.
    """
    index = file_in(folder, INDEX)
    try:
        entries = read_json(files, index).get("weight_map")
    except NotFoundError:
        _require_single(files, folder)
        return None
    if not isinstance(entries, dict) or not entries or not all(_is_name(value) for value in entries.values()):
        raise InvalidModelError(f"{index}: weight_map must map tensors to file names beside it; copy the file again")
    return entries


def check_weights(files: Objects, folder: str) -> None:
    """Raise what ``read_weight_map`` raises, and InvalidModelError for a file of the index that does not exist."""
    names = sorted(set((read_weight_map(files, folder) or {}).values()))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, found in zip(names, pool.map(lambda name: exists(files, file_in(folder, name)), names), strict=True):
            if not found:
                raise missing_shard(folder, name)


def missing_shard(folder: str, name: str) -> InvalidModelError:
    """Return the error for a file that the index names and that does not exist."""
    return InvalidModelError(f"{file_in(folder, name)}: {INDEX} names this file, but it is missing; copy it there")


def check_tokenizer(where: str, names: Collection[str]) -> None:
    """Raise NotFoundError if the ``names`` of the files at ``where`` include no tokenizer."""
    if not any(name in names for name in VOCABULARIES):
        raise NotFoundError(
            f"{where} holds no tokenizer ({', '.join(VOCABULARIES)}); copy its files there,"
            " or set spec.tokenizer.uri to a folder that has one"
        )


def exists(files: Objects, uri: str) -> bool:
    """Return whether there is an object at this address."""
    try:
        files.stat(uri)
    except NotFoundError:
        return False
    return True


def file_in(folder: str, name: str) -> str:
    """Return the address of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def _require_single(files: Objects, folder: str) -> None:
    if exists(files, file_in(folder, SINGLE)):
        return
    for name in PICKLED:
        if exists(files, file_in(folder, name)):
            raise InvalidModelError(
                f"{file_in(folder, name)}: pickled weights can run code and are not read;"
                " save the model again with safe_serialization=True"
            )
    raise NotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; is it a Hugging Face model folder?")


def _is_name(value: object) -> bool:
    """Whether a value of the index is the name of a file in the same folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\\"} & set(value)
