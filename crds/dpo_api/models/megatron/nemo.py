"""A .nemo archive of NeMo 1.x as a Hugging Face folder."""

from __future__ import annotations

import builtins  # `list` is a method here
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.models.folder import Files
from dpo_api.models.megatron.members import Extent, members
from dpo_api.models.megatron.settings import CONFIG, LARGEST, NemoSettings, read_settings
from dpo_api.models.megatron.shape import Shape
from dpo_api.models.megatron.torchfiles import TENSORS, Tensor, TorchFile, tensors_in
from dpo_api.models.megatron.weights import parameter_of

WEIGHTS = "model_weights.ckpt"
EMBEDDING = "embedding.word_embeddings.weight"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Type of a tensor → config.json's name of it."""
_AT_ONCE = 8
_LARGEST_TOKENIZER = 256 << 20
_RANKS = re.compile(r"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/" + re.escape(WEIGHTS))


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor-parallel rank's part of a parameter, or the whole one: raw bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    place: Extent


@dataclass(frozen=True, slots=True)
class Description:
    """A file of the folder."""

    uri: str
    size: int
    etag: str = ""


class NemoModel:
    """Files of a Hugging Face folder, made from an archive: config.json and the tokenizer. Its weights: ``parameters``.

    It has the methods of ``Files`` for addresses below its own, so that whatever reads a model folder reads it too.
    """

    def __init__(self, files: Files, uri: str) -> None:
        """Nothing is read yet."""
        self.files, self.uri = files, uri.rstrip("/")

    # -- as a folder

    def children(self, folder: str) -> builtins.list[str]:
        """Return the names of its files."""
        return ["config.json", *self._tokenizer] if folder.rstrip("/") == self.uri else []

    def list(self, folder: str) -> Iterator[Description]:
        """Describe its files."""
        for name in self.children(folder):
            yield self.stat(f"{self.uri}/{name}")

    def stat(self, uri: str) -> Description:
        """Describe one of its files. Raises NotFoundError."""
        return Description(uri, len(self.read(uri)))

    def read(self, source: Any, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of one of its files. Raises NotFoundError."""
        uri = source if isinstance(source, str) else source.uri
        name = uri.removeprefix(f"{self.uri}/")
        if name == "config.json":
            data = self._config
        elif name in self._tokenizer:
            member = self._tokenizer[name]
            if member.size > _LARGEST_TOKENIZER:
                raise self.error(f"its {name} has {member.size:,} bytes, which no tokenizer has")
            data = member.read(self.files)
        else:
            raise NotFoundError(f"{uri} does not exist")
        return data[start:] if length is None else data[start : start + length]

    # -- what it holds

    @cached_property
    def shape(self) -> Shape:
        """What the model computes."""
        parts = [tensor for _, tensor in self._tables.get(EMBEDDING, [])]
        if not parts or not parts[0].shape:
            raise self.error("its weights hold no embedding")
        kind = parts[0].dtype
        return self.settings.shape(sum(part.shape[0] for part in parts), DTYPES.get(kind, kind))

    @cached_property
    def settings(self) -> NemoSettings:
        """What model_config.yaml says."""
        member = self._members.get(CONFIG)
        if member is None:
            raise InvalidModelError(f"{self.uri}: it holds no {CONFIG}; is it a .nemo archive of NeMo 1.x?")
        if member.size > LARGEST:
            raise self.error(f"its {CONFIG} has {member.size:,} bytes")
        return read_settings(member.read(self.files), f"{self.uri}/{CONFIG}")

    @cached_property
    def parameters(self) -> dict[str, builtins.list[Stored]]:
        """Parameter of the whole model → the parts of its tensor-parallel ranks, in their order."""
        flat = [item for parts in self._tables.values() for item in parts]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            places = pool.map(lambda item: item[0].place(item[1]), flat)
            stored = iter(
                [Stored(item[1].dtype, item[1].shape, place) for item, place in zip(flat, places, strict=True)]
            )
        return {name: [next(stored) for _ in parts] for name, parts in self._tables.items()}

    @cached_property
    def _tables(self) -> dict[str, builtins.list[tuple[TorchFile, Tensor]]]:
        """Parameter of the whole model → its parts, and the files that hold them."""
        ranks = self._ranks
        tensor, pipeline = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
        if len(ranks) != tensor * pipeline:
            raise self.error(f"it holds the weights of {len(ranks)} ranks, and {tensor} x {pipeline} ranks saved them")
        layers = self.settings.keys.integer("num_layers")
        if layers % pipeline:
            raise self.error(f"{layers} layers are not divided equally among its {pipeline} pipeline stages")
        found: dict[str, builtins.list[tuple[TorchFile, Tensor]]] = {}
        for (_, stage), member in sorted(ranks.items()):
            file = TorchFile(self.files, member, self.uri, TENSORS)
            value = file.value
            if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
                value = value["state_dict"]
            for key, saved in tensors_in(value).items():
                name = parameter_of(key, stage * (layers // pipeline))
                if name is not None and not (name == EMBEDDING and stage):
                    found.setdefault(name, []).append((file, saved))
        return found

    def check_weights(self) -> None:
        """Raise InvalidModelError for weights whose tables cannot be read or that miss ranks."""
        _ = self._tables

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(member.size for member in self._ranks.values())

    def error(self, why: str) -> InvalidModelError:
        """Return the error that names the archive."""
        return InvalidModelError(f"{self.uri}: {why}; copy or download it again")

    @cached_property
    def _members(self) -> dict[str, Extent]:
        return members(self.files, self.uri)

    @property
    def _ranks(self) -> dict[tuple[int, int], Extent]:
        """(tensor-parallel rank, pipeline stage) → its file of weights."""
        if WEIGHTS in self._members:
            return {(0, 0): self._members[WEIGHTS]}
        found: dict[tuple[int, int], Extent] = {}
        for name, member in self._members.items():
            match = _RANKS.fullmatch(name)
            if match is not None:
                found[int(match[1] or match[2]), int(match[3] or 0)] = member
        if not found:
            raise InvalidModelError(
                f"{self.uri}: it holds no weights (…/{WEIGHTS}); is it a .nemo archive of a GPT model?"
            )
        return found

    @cached_property
    def _config(self) -> bytes:
        return (json.dumps(self.shape.config_json(f"{self.uri}/{CONFIG}"), indent=2) + "\n").encode()

    @cached_property
    def _tokenizer(self) -> dict[str, Extent]:
        """The tokenizer's files under Hugging Face's names; empty if the archive has none that is read."""
        settings = self.settings.keys.get("tokenizer")
        if not isinstance(settings, Mapping):
            return {}
        wanted: dict[str, tuple[str, ...]] = {}
        if settings.get("library") == "sentencepiece":
            wanted = {"tokenizer.model": ("model", "tokenizer_model")}
        elif settings.get("library") == "megatron" and settings.get("type") == "GPT2BPETokenizer":
            wanted = {"vocab.json": ("vocab_file",), "merges.txt": ("merge_file",)}
        found = {}
        for name, keys in wanted.items():
            members_of = [self._artifact(settings.get(key)) for key in keys]
            member = next((member for member in members_of if member is not None), None)
            if member is None:
                return {}
            found[name] = member
        return found

    def _artifact(self, value: object) -> Extent | None:
        """Return the member that a setting names: ``nemo:MEMBER``, or a path whose last part it was packed under."""
        if not isinstance(value, str) or not value:
            return None
        if value.startswith("nemo:"):
            return self._members.get(value.removeprefix("nemo:").removeprefix("./"))
        return self._members.get(value.rpartition("/")[2])
