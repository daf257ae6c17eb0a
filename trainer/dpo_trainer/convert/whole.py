"""A model that is read one tensor at a time, in one process, whatever its format."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dpo_api.models import ModelConfig
from dpo_api.models.folder import Files
from dpo_trainer.formats.adapter import AdapterMatrices, MergedWeights
from dpo_trainer.formats.huggingface import open_weights
from dpo_trainer.formats.layout import Slot, assemble, slots
from dpo_trainer.formats.safetensors_reader import DTYPES
from dpo_trainer.formats.weights import Weights

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
"""The name of a layer's parameter: the layer's number from 0, and the name in the layer."""


@dataclass(frozen=True)
class Whole:
    """A model's configuration, and its weights under Hugging Face's names."""

    files: Files
    """Its files as those of a Hugging Face folder: config.json and the tokenizer."""
    uri: str
    config: ModelConfig
    weights: Weights
    dtype: torch.dtype | None = None
    """The type to write the weights in; None: each tensor's own."""
    base: Weights | None = None
    """The weights without the adapter that they contain; None: they contain none."""

    @classmethod
    def open(
        cls,
        files: Files,
        uri: str,
        config: ModelConfig,
        dtype: torch.dtype | None = None,
        adapter: AdapterMatrices | None = None,
    ) -> "Whole":
        """Read the headers of the weights. Raises InvalidModelError if they are not those of the configuration.

        adapter: is added to the weights, in fp32, as they are read.
        """
        weights = open_weights(files, uri)
        weights.check(config)
        if adapter is None:
            return cls(files, uri, config, weights, dtype)
        return cls(files, uri, config, MergedWeights(weights, adapter), dtype, weights)

    @property
    def slots(self) -> list[Slot]:
        """Every parameter of the model, in its order."""
        return list(slots(self.config, range(self.config.num_layers), first=True, last=True))

    @property
    def groups(self) -> Iterator[tuple[int | None, list[Slot]]]:
        """Yield the parameters of each layer with its number, and of each other module with None, in their order."""
        for _, group in groupby(self.slots, lambda slot: _layer_of(slot) or slot.parameter.rpartition(".")[0]):
            held = list(group)
            layer = _layer_of(held[0])
            yield None if layer is None else int(layer), held

    @property
    def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors under Hugging Face's names, with their shapes."""
        for slot in self.slots:
            yield from zip(slot.sources, slot.shapes, strict=True)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type that a tensor is written in: with an adapter, that of the model without it."""
        return self.dtype or DTYPES[(self.base or self.weights).info(name).dtype]

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor, or its rows [rows[0], rows[1]), in the type that it is written in."""
        return self.weights.read(name, rows).to(self.dtype_of(name))

    def parameter(self, slot: Slot) -> Tensor:
        """Read one of Megatron-Core's parameters, in the widest type of the tensors that it is made of."""
        return assemble(slot, self.config, self.tensor, 0, 1)


def _layer_of(slot: Slot) -> str | None:
    found = LAYER.match(slot.parameter)
    return found[1] if found else None
