"""Loads the weights of Hugging Face model folders. Weights are never unpickled."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.models import ModelConfig
from dpo_api.models.folder import INDEX, SINGLE, missing_shard, read_weight_map
from dpo_api.models.megatron.presented import PresentedModel
from dpo_api.models.stages import layers_of_stages
from dpo_store import join_uri
from dpo_trainer import messages
from dpo_trainer.formats.delivery import deliver
from dpo_trainer.formats.layout import Slot, slots, target
from dpo_trainer.formats.megatron import MegatronWeights
from dpo_trainer.formats.safetensors_reader import WEIGHT_DTYPES, RangeStore, SafetensorsFile
from dpo_trainer.formats.weights import TensorInfo, Weights
from dpo_trainer.model.forward import unwrap


@dataclass
class Checkpoint:
    """The safetensors files of a folder, and which of them holds each tensor. Headers are read when first needed."""

    store: RangeStore
    folder: str
    weight_map: dict[str, str]  #: tensor → file name
    files: dict[str, SafetensorsFile]

    @classmethod
    def open(cls, store: RangeStore, folder: str) -> "Checkpoint":
        """Find the folder's weights: those of its index, or else its single file. Errors: see ``read_weight_map``."""
        weight_map = read_weight_map(store, folder)
        if weight_map is not None:
            return cls(store, folder, weight_map, {})
        file = SafetensorsFile(store, join_uri(folder, SINGLE))
        return cls(store, folder, dict.fromkeys(file.tensors, SINGLE), {SINGLE: file})

    @classmethod
    def known(cls, store: RangeStore, folder: str, description: dict[str, Any]) -> "Checkpoint":
        """Return the folder's weights as another process has described them, without reading."""
        files = {
            name: SafetensorsFile(store, join_uri(folder, name), known) for name, known in description["files"].items()
        }
        return cls(store, folder, description["weight_map"], files)

    def describe(self) -> dict[str, Any]:
        """Return what is known of the folder, of JSON's types."""
        return {"weight_map": self.weight_map, "files": {name: file.describe() for name, file in self.files.items()}}

    def file_of(self, tensor: str) -> SafetensorsFile:
        """Return the file that holds a tensor, with its header checked."""
        name = self.weight_map[tensor]
        if name not in self.files:
            try:
                self.files[name] = SafetensorsFile(self.store, join_uri(self.folder, name))
            except NotFoundError:
                raise missing_shard(self.folder, name) from None
        file = self.files[name]
        if tensor not in file.tensors:
            raise InvalidModelError(f"{file.uri}: {INDEX} puts tensor {tensor} here, but the file does not hold it")
        return file

    @property
    def header_bytes(self) -> int:
        """Bytes of the headers that were read."""
        return sum(file.header_bytes for file in self.files.values())

    def info(self, name: str) -> TensorInfo:
        """Describe a tensor."""
        return self.file_of(name).tensors[name]

    def read(
        self, name: str, rows: tuple[int, int] | None = None, watch: Callable[[memoryview], object] | None = None
    ) -> Tensor:
        """Read a tensor or some of its rows: see ``SafetensorsFile.read``."""
        return self.file_of(name).read(name, rows, watch)

    def check(self, config: ModelConfig) -> None:
        """Raise InvalidModelError naming any tensor that is missing, unexpected, mis-shaped or quantised."""
        expected: dict[str, tuple[int, ...]] = {}
        for slot in slots(config, range(config.num_layers), first=True, last=True):
            expected.update(zip(slot.sources, slot.shapes, strict=True))
        missing = sorted(expected.keys() - self.weight_map.keys())
        if missing:
            raise InvalidModelError(
                f"{self.folder}: tensor {missing[0]} is missing{_and_more(missing)}; "
                "config.json and the weights disagree"
            )
        ignored = {f"{config.row.tensors.head}.weight"} if config.tied_embeddings else set()
        extra = sorted(
            name
            for name in self.weight_map.keys() - expected.keys() - ignored
            if not name.endswith("rotary_emb.inv_freq")
        )
        if extra:
            raise InvalidModelError(
                f"{self.folder}: tensor {extra[0]} is unexpected{_and_more(extra)}; "
                "config.json and the weights disagree"
            )
        for name, shape in expected.items():
            file = self.file_of(name)
            info = file.tensors[name]
            if info.dtype not in WEIGHT_DTYPES:
                kinds = ", ".join(WEIGHT_DTYPES)
                raise InvalidModelError(
                    f"{file.uri}: tensor {name} has dtype {info.dtype}; "
                    f"trainable weights are {kinds}: use the original model"
                )
            if info.shape != shape:
                raise InvalidModelError(
                    f"{file.uri}: tensor {name} has shape {list(info.shape)}, config.json means {list(shape)}; "
                    "the weights and config.json must come from the same model"
                )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model. The same on every rank."""

    fingerprint: str  #: see load_weights
    bytes: int  #: read by all ranks together
    seconds: float


def open_checkpoint(store: RangeStore, folder: str, config: ModelConfig) -> Weights:
    """Open the folder's weights and check them; rank 0 reads the headers for all. A collective of all ranks.

    Errors, on every rank: see ``Checkpoint.open`` and ``Checkpoint.check``.
    """

    def opened() -> dict[str, Any]:
        found = open_weights(store, folder)
        found.check(config)
        return found.describe()

    described = messages.agreed(opened)
    if isinstance(store, PresentedModel):
        return MegatronWeights.known(store, config, described)
    return Checkpoint.known(store, folder, described)


def open_weights(files: RangeStore, folder: str) -> Weights:
    """Open the weights of a model folder, or of a model that ``files`` present as one. Raises InvalidModelError."""
    return MegatronWeights.open(files) if isinstance(files, PresentedModel) else Checkpoint.open(files, folder)


def load_weights(model: Any, store: RangeStore, folder: str, *, checkpoint: Weights | None = None) -> Loaded:
    """Fill this rank's part of ``model`` from the folder, each byte of which is read once. A collective of all ranks.

    The fingerprint is the sha256 of the model's content: its architecture, and every used tensor's name, dtype, shape
    and bytes. How the tensors are spread over files and ranks does not matter, nor do dates or ETags. Memory, besides
    the model's part: see ``delivery``. Raises InvalidModelError naming the file and tensor for anything damaged or
    inconsistent. checkpoint: the folder's, if the caller has opened it already.
    """
    started = time.monotonic()
    gpt = unwrap(model)
    config: ModelConfig = gpt.dpo_config
    source = checkpoint or open_checkpoint(store, folder, config)
    with torch.no_grad():
        found = deliver(config, source, stage_slots(gpt), lambda slot: target(gpt, slot))
    keys = [_tensor_key(name, source.info(name), digest) for name, digest in sorted(found.digests.items())]
    fingerprint = hashlib.sha256("\n".join([config.fingerprint, *keys]).encode()).hexdigest()
    return Loaded(fingerprint, source.header_bytes + found.bytes, time.monotonic() - started)


def stage_slots(gpt: Any) -> list[Slot]:
    """Return the slots of this process's pipeline stage."""
    return slots_by_stage(gpt.dpo_config)[parallel_state.get_pipeline_model_parallel_rank()]


def slots_by_stage(config: ModelConfig) -> list[list[Slot]]:
    """Return the slots of each pipeline stage."""
    spans = layers_of_stages(config.num_layers, parallel_state.get_pipeline_model_parallel_world_size())
    return [
        list(slots(config, span, first=stage == 0, last=stage == len(spans) - 1)) for stage, span in enumerate(spans)
    ]


def check_tokenizer(config: ModelConfig, largest_id: int, where: str) -> None:
    """Raise InvalidModelError when the tokenizer at ``where`` can produce ids that the model has no embedding for.

    A smaller tokenizer is fine: models pad their vocabulary.
    """
    if largest_id >= config.vocab_size:
        raise InvalidModelError(
            f"{where}: the tokenizer's largest id is {largest_id}, but the model's vocab_size is {config.vocab_size}; "
            "use the model's own tokenizer"
        )


def _tensor_key(name: str, info: TensorInfo, digest: str) -> str:
    return f"{name} {info.dtype} {list(info.shape)} {digest}"


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
