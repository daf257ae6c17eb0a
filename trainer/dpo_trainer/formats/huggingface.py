"""Loads the weights of Hugging Face model folders. Weights are never unpickled."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.models import ModelConfig, read_config
from dpo_api.models.folder import INDEX, SINGLE, missing_shard, read_weight_map
from dpo_api.models.stages import layers_of_stages
from dpo_store import join_uri
from dpo_trainer.formats.layout import Slot, assemble, slots, target
from dpo_trainer.formats.safetensors_reader import WEIGHT_DTYPES, RangeStore, SafetensorsFile
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


def load_weights(model: Any, store: RangeStore, folder: str, *, checkpoint: Checkpoint | None = None) -> str:
    """Fill this rank's part of ``model`` from the folder; return the model's content key (see ``model_fingerprint``).

    Reads only the rows that this rank needs, one tensor at a time: memory is the largest parameter and its sources.
    The key costs nothing more when this process reads the whole model (tensor and pipeline size 1); else the files are
    read once more. Raises InvalidModelError naming the file and tensor for anything damaged or inconsistent.
    checkpoint: the folder's, if the caller has opened it already.
    """
    gpt = unwrap(model)
    config: ModelConfig = gpt.dpo_config
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    checkpoint = checkpoint or Checkpoint.open(store, folder)
    checkpoint.check(config)
    digests: dict[str, str] = {}

    def read(name: str, rows: tuple[int, int] | None) -> Tensor:
        file = checkpoint.file_of(name)
        shape = file.tensors[name].shape
        digest = hashlib.sha256()
        tensor = file.read(name, rows, digest.update)
        if rows in (None, (0, shape[0])):
            digests[name] = _tensor_key(name, file, digest.hexdigest())
        return tensor

    with torch.no_grad():
        for slot in stage_slots(gpt):
            target(gpt, slot).copy_(assemble(slot, config, read, rank, size))
    if size == 1 and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return _combine(config, digests)
    return model_fingerprint(store, folder)


def model_fingerprint(store: RangeStore, folder: str) -> str:
    """sha256 of the model's content: its architecture, and every used tensor's name, dtype, shape and bytes.

    How the tensors are spread over files does not matter, nor do dates or ETags. Reads every weight once (about 1 s a
    GB); memory is one tensor.
    """
    config = read_config(store, folder)
    checkpoint = Checkpoint.open(store, folder)
    checkpoint.check(config)
    digests: dict[str, str] = {}
    for slot in slots(config, range(config.num_layers), first=True, last=True):
        for name in slot.sources:
            file = checkpoint.file_of(name)
            digest = hashlib.sha256()
            file.read(name, None, digest.update)
            digests[name] = _tensor_key(name, file, digest.hexdigest())
    return _combine(config, digests)


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


def _tensor_key(name: str, file: SafetensorsFile, digest: str) -> str:
    info = file.tensors[name]
    return f"{name} {info.dtype} {list(info.shape)} {digest}"


def _combine(config: ModelConfig, digests: dict[str, str]) -> str:
    lines = [config.fingerprint, *(digests[name] for name in sorted(digests))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
