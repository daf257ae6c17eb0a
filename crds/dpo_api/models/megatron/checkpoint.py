"""A distributed checkpoint of Megatron-Core as a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.models.folder import Archives, read_json
from dpo_api.models.megatron.arguments import NAMES, Values, shape_of
from dpo_api.models.megatron.distributed import TABLE, Checkpoint
from dpo_api.models.megatron.members import Extent
from dpo_api.models.megatron.nemo_tokenizer import GPT2, check_family, gpt2_files
from dpo_api.models.megatron.presented import DTYPES, TOKENIZER_FILES, Companion, PresentedModel, embedding_of
from dpo_api.models.megatron.shape import Shape
from dpo_api.models.megatron.stored import Stored
from dpo_api.models.megatron.torchfiles import TorchFile
from dpo_api.models.megatron.weights import distributed_parameters

LATEST = "latest_checkpointed_iteration.txt"
COMMON = "common_state/shard_0_1"
"""Object of the values that are not tensors, since Megatron-Core 0.19; a file of its own before."""
COMMON_FILE = "common.pt"
_COMPLETE = frozenset({"tokenizer.json", "tokenizer.model", "tokenizer_config.json"})
"""Files with which a folder says how its tokenizer is read."""
_ITERATION = re.compile(r"iter_(\d{7,})/")
_INSIDE = (TABLE, "metadata.json", COMMON_FILE)


class MegatronModel(PresentedModel):
    """The folder of a checkpoint, or a folder of several that Megatron-LM has written, of which one is read."""

    def __init__(
        self, files: Archives, uri: str, iteration: int | None = None, architecture: str | None = None
    ) -> None:
        """iteration: None means the newest. architecture: address of a config.json; None: read Megatron-LM's arguments.

        Nothing is read yet.
        """
        super().__init__(files, uri)
        self._iteration, self._architecture = iteration, architecture

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The keys of config.json."""
        if self._architecture is not None:
            found = read_json(self.files, self._architecture)
            layers = found.get("num_hidden_layers")
            if isinstance(layers, int):
                self.check_layers(layers, self.parameters)
            return found
        return self._shape.config_json(self._folder)

    @property
    def gamma_offset(self) -> int:  # type: ignore[override] # computed
        """What is added to the norms' weights. With a config.json they are those of its family."""
        return 0 if self._architecture is not None else self._shape.gamma_offset

    @cached_property
    def _shape(self) -> Shape:
        arguments = self._arguments
        if arguments is None:
            raise InvalidModelError(
                f"{self._folder}: it does not hold Megatron-LM's arguments, so the model's architecture is unknown; set"
                " spec.model.megatron.architectureURI to a config.json"
            )
        embedding = embedding_of(self._checkpoint)
        found = shape_of(arguments, self._folder, embedding.shape[0], DTYPES.get(embedding.dtype, embedding.dtype))
        self.check_layers(found.layers, self.parameters)
        return found

    @cached_property
    def parameters(self) -> Mapping[str, list[Stored]]:
        """Where each parameter is."""
        embedding_of(self._checkpoint)
        return {name: [part] for name, part in distributed_parameters(self._checkpoint.tensors).items()}

    def check_weights(self) -> None:
        """Raise InvalidModelError for a table that cannot be read."""
        embedding_of(self._checkpoint)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the checkpoint's files, with an optimizer's state if it has one."""
        return sum(member.size for member in self._members.values())

    @cached_property
    def companions(self) -> Mapping[str, Companion]:
        """The tokenizer's files, if they are beside the checkpoint."""
        names = self.files.children(self.uri)
        found: dict[str, Companion] = {name: self._beside(name) for name in TOKENIZER_FILES if name in names}
        return found if _COMPLETE.intersection(found) else {**found, **self._gpt2(names)}

    def check_tokenizer(self) -> None:
        """Raise NotFoundError if there is none, InvalidModelError for one that the model's family does not have."""
        super().check_tokenizer()
        check_family(self.companions, str(self.config["model_type"]), self._folder)

    def _gpt2(self, names: list[str]) -> dict[str, Companion]:
        """Return the files of GPT-2's tokenizer if Megatron-LM's arguments name it and both files are there."""
        arguments = self._arguments or {}
        if arguments.get("tokenizer_type") != GPT2:
            return {}
        parts = {}
        for name, key in (("vocab.json", "vocab_file"), ("merges.txt", "merge_file")):
            own = next((own for own in (name, str(arguments.get(key)).rpartition("/")[2]) if own in names), None)
            if own is None:
                return {}
            parts[name] = self._beside(own)
        return gpt2_files(parts, self.uri, self.contents)

    def _beside(self, name: str) -> Extent:
        info = self.files.stat(f"{self.uri}/{name}")
        return Extent(info, 0, info.size)

    @cached_property
    def _arguments(self) -> Mapping[str, Any] | None:
        value = self._checkpoint.value_of(COMMON, NAMES)
        if value is None and COMMON_FILE in self._members:
            member = self._members[COMMON_FILE]
            value = TorchFile(self.files, member, f"{self._folder}/{COMMON_FILE}", NAMES).value
        if isinstance(value, list) and value:
            value = value[0]
        found = value.get("args") if isinstance(value, Mapping) else None
        return found.fields if isinstance(found, Values) else None

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.files, self._members, self._folder)

    @cached_property
    def _members(self) -> dict[str, Extent]:
        start = self._folder + "/"
        return {info.uri.removeprefix(start): Extent(info, 0, info.size) for info in self.files.list(start)}

    @cached_property
    def _folder(self) -> str:
        """The folder of the one checkpoint. Raises NotFoundError."""
        names = self.files.children(self.uri)
        if set(_INSIDE).intersection(names):
            return self.uri
        if self._iteration is not None:
            wanted = f"iter_{self._iteration:07d}"
            if wanted + "/" not in names:
                found = ", ".join(str(number) for number in self._iterations(names)) or "none"
                raise NotFoundError(f"{self.uri}: it holds no {wanted}; iterations: {found}")
            return f"{self.uri}/{wanted}"
        if LATEST in names:
            latest = self.files.read(f"{self.uri}/{LATEST}", 0, 64).decode(errors="replace").strip()
            wanted = latest if latest == "release" else f"iter_{int(latest):07d}" if latest.isdecimal() else ""
            if wanted + "/" not in names:
                raise NotFoundError(f"{self.uri}: {LATEST} says {latest!r}, and there is no such checkpoint")
            return f"{self.uri}/{wanted}"
        iterations = self._iterations(names)
        if iterations:
            return f"{self.uri}/iter_{iterations[-1]:07d}"
        inside = next((name for name in ("release/", "weights/") if name in names), None)
        if inside is None:
            raise NotFoundError(
                f"{self.uri}: it holds no distributed checkpoint of Megatron-Core ({TABLE}, iter_…/, release/)"
            )
        return f"{self.uri}/{inside.rstrip('/')}"

    def _iterations(self, names: list[str]) -> list[int]:
        return sorted(int(found[1]) for name in names if (found := _ITERATION.fullmatch(name)))
