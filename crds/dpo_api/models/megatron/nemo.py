"""A .nemo archive of NeMo 1.x as a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from dpo_api.errors import InvalidModelError
from dpo_api.models.megatron.distributed import Checkpoint
from dpo_api.models.megatron.members import Extent, members
from dpo_api.models.megatron.nemo_tokenizer import check_family, find
from dpo_api.models.megatron.presented import DTYPES, EMBEDDING, Companion, PresentedModel, embedding_of
from dpo_api.models.megatron.settings import CONFIG, LARGEST, NemoSettings, read_settings
from dpo_api.models.megatron.shape import Shape
from dpo_api.models.megatron.stored import Stored, whole
from dpo_api.models.megatron.torchfiles import TENSORS, Tensor, TorchFile, tensors_in
from dpo_api.models.megatron.weights import distributed_parameters, parameter_of

WEIGHTS = "model_weights.ckpt"
"""A file of weights in the layout before Megatron-Core's."""
FOLDER = "model_weights/"
"""A distributed checkpoint of Megatron-Core."""
_AT_ONCE = 8
_RANKS = re.compile(r"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/" + re.escape(WEIGHTS))


class NemoModel(PresentedModel):
    """An archive, or the folder it was unpacked to."""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The keys of config.json."""
        return self.shape.config_json(f"{self.uri}/{CONFIG}")

    @cached_property
    def shape(self) -> Shape:
        """What the model computes."""
        if self._distributed is not None:
            embedding = embedding_of(self._distributed)
            rows, kind = embedding.shape[0], embedding.dtype
        else:
            parts = [tensor for _, tensor in self._tables.get(EMBEDDING, [])]
            if not parts or not parts[0].shape:
                raise self.error("its weights hold no embedding")
            rows, kind = sum(part.shape[0] for part in parts), parts[0].dtype
        found = self.settings.shape(rows, DTYPES.get(kind, kind))
        self.check_layers(found.layers, self._tables if self._distributed is None else self.parameters)
        return found

    @cached_property
    def settings(self) -> NemoSettings:
        """What model_config.yaml says."""
        member = self._members.get(CONFIG)
        if member is None:
            raise InvalidModelError(f"{self.uri}: it holds no {CONFIG}; is it a .nemo archive of NeMo 1.x?")
        if member.size > LARGEST:
            raise self.error(f"its {CONFIG} has {member.size:,} bytes")
        return read_settings(member.read(self.files), f"{self.uri}/{CONFIG}")

    @property
    def gamma_offset(self) -> int:  # type: ignore[override] # computed
        """What is added to the norms' weights."""
        return self.shape.gamma_offset

    @property
    def legacy_qkv(self) -> bool:  # type: ignore[override] # computed
        """Whether the order is that of Megatron-LM before version 2."""
        return self.settings.legacy_qkv

    @cached_property
    def parameters(self) -> Mapping[str, list[Stored]]:
        """Where each parameter is."""
        if self._distributed is not None:
            return {name: [part] for name, part in distributed_parameters(self._distributed.tensors).items()}
        flat = [item for parts in self._tables.values() for item in parts]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            places = pool.map(lambda item: item[0].place(item[1]), flat)
            found = zip(flat, places, strict=True)
            stored = iter([whole(tensor.dtype, tensor.shape, place) for (_, tensor), place in found])
        return {name: [next(stored) for _ in parts] for name, parts in self._tables.items()}

    def check_weights(self) -> None:
        """Raise InvalidModelError for tables that cannot be read and for ranks that are missing."""
        _ = self._distributed or self._tables

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files of weights."""
        folder = sum(member.size for name, member in self._members.items() if name.startswith(FOLDER))
        return folder or sum(member.size for member in self._ranks.values())

    @cached_property
    def _distributed(self) -> Checkpoint | None:
        inside = {
            name.removeprefix(FOLDER): member for name, member in self._members.items() if name.startswith(FOLDER)
        }
        return Checkpoint(self.files, inside, f"{self.uri}/{FOLDER.rstrip('/')}") if inside else None

    @cached_property
    def _tables(self) -> dict[str, list[tuple[TorchFile, Tensor]]]:
        """Parameter of the whole model → its parts, and the files that hold them."""
        ranks = self._ranks
        tensor, pipeline = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
        if len(ranks) != tensor * pipeline:
            raise self.error(f"it holds the weights of {len(ranks)} ranks, and {tensor} x {pipeline} ranks saved them")
        layers = self.settings.keys.integer("num_layers")
        if layers % pipeline:
            raise self.error(f"{layers} layers are not divided equally among its {pipeline} pipeline stages")
        found: dict[str, list[tuple[TorchFile, Tensor]]] = {}
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

    def prepare(self) -> None:
        """Decompress the archive on this node if it is compressed."""
        _ = self._members

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
                f"{self.uri}: it holds no weights ({WEIGHTS} or {FOLDER}); is it a .nemo archive of a GPT model?"
            )
        return found

    @cached_property
    def companions(self) -> Mapping[str, Companion]:
        """The tokenizer's files; empty if it is none that is read, which ``check_tokenizer`` explains."""
        try:
            return self._tokenizer
        except InvalidModelError:
            return {}

    def check_tokenizer(self) -> None:
        """Raise InvalidModelError naming the setting of a tokenizer that is not read."""
        _ = self._tokenizer

    @cached_property
    def _tokenizer(self) -> Mapping[str, Companion]:
        where, keys = f"{self.uri}/{CONFIG}", self.settings.keys
        found = find(keys.get("tokenizer"), self._members, where, self.contents)
        check_family(found, self.config["model_type"], where)
        return found
