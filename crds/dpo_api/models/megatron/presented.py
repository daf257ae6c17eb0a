"""A model of Megatron's world, presented as a Hugging Face folder."""

from __future__ import annotations

import builtins  # `list` is a method here
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.models.folder import VOCABULARIES, Archives, check_tokenizer
from dpo_api.models.megatron.distributed import Checkpoint
from dpo_api.models.megatron.members import Extent
from dpo_api.models.megatron.stored import Stored
from dpo_api.models.megatron.weights import UP, distributed_parameters, layers_in

EMBEDDING = "embedding.word_embeddings.weight"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Type of a tensor → config.json's name of it."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a tokenizer beside a checkpoint or inside of an archive."""
_LARGEST_COMPANION = 256 << 20
type Companion = Extent | Callable[[], bytes]
"""Where a file of the tokenizer is, or what makes it."""


@dataclass(frozen=True, slots=True)
class Description:
    """A file of the folder."""

    uri: str
    size: int
    etag: str = ""


class PresentedModel(ABC):
    """Files of a Hugging Face folder, made from another format: config.json and the tokenizer's.

    It has the methods of ``Files`` for addresses below its own, so that whatever reads a model folder reads it too. Its
    weights are described by ``parameters``; ``dpo_trainer.formats.megatron`` reads them.
    """

    def __init__(self, files: Archives, uri: str) -> None:
        """Nothing is read yet."""
        self.files, self.uri = files, uri.rstrip("/")

    # -- what a format tells

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The keys of config.json. Raises InvalidModelError for a model that no family computes."""

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, builtins.list[Stored]]:
        """Parameter of the whole model → the parts of its tensor-parallel ranks, in their order.

        Parameters have the names of Megatron-Core's layer without Transformer Engine.
        """

    @property
    @abstractmethod
    def companions(self) -> Mapping[str, Companion]:
        """The tokenizer's files under Hugging Face's names; empty if there are none that are read."""

    def check_tokenizer(self) -> None:
        """Raise NotFoundError or InvalidModelError that says why there is no tokenizer, if there is none."""
        check_tokenizer(self.uri, self.companions)

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of the files of weights."""

    def prepare(self) -> None:
        """Make what reading needs on this node, where another process has read the tables."""
        return

    @abstractmethod
    def check_weights(self) -> None:
        """Raise InvalidModelError for what is wrong with the weights, without reading them."""

    gamma_offset: int = 0
    """What is added to the norms' weights of the files to get those of the family."""
    legacy_qkv: bool = False
    """Whether each part has all of its queries, then its keys, then its values."""

    @property
    def separate_gate(self) -> bool:
        """Whether the gate and the up projection are two parameters."""
        return any(name.endswith(UP) for name in self.parameters)

    # -- as a folder

    def children(self, folder: str) -> builtins.list[str]:
        """Return the names of its files."""
        return ["config.json", *self.companions] if folder.rstrip("/") == self.uri else []

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
            data = self._config_json
        elif name in self.companions:
            member = self.companions[name]
            data = self.contents(name, member) if isinstance(member, Extent) else member()
        else:
            raise NotFoundError(f"{uri} does not exist")
        return data[start:] if length is None else data[start : start + length]

    def contents(self, name: str, member: Extent) -> bytes:
        """Read a file of the tokenizer. Raises InvalidModelError if it is too large for one."""
        if member.size > _LARGEST_COMPANION:
            raise self.error(f"its {name} has {member.size:,} bytes, which no tokenizer has")
        return member.read(self.files)

    @cached_property
    def _config_json(self) -> bytes:
        return (json.dumps(self.config, indent=2) + "\n").encode()

    def check_layers(self, named: int, parameters: Iterable[str]) -> None:
        """Raise InvalidModelError if the settings name another number of layers than the weights have."""
        held = layers_in(parameters)
        if named != held:
            raise self.error(f"its settings name {named:,} layers, and its weights have {held:,}")

    def error(self, why: str) -> InvalidModelError:
        """Return the error that names the model."""
        return InvalidModelError(f"{self.uri}: {why}; copy or download it again")


def embedding_of(checkpoint: Checkpoint) -> Stored:
    """Return the embedding of a distributed checkpoint. Raises InvalidModelError."""
    found = distributed_parameters(checkpoint.tensors).get(EMBEDDING)
    if found is None or len(found.shape) != 2:
        raise checkpoint.error(f"it holds no {EMBEDDING}; is it a checkpoint of a GPT model?")
    return found
