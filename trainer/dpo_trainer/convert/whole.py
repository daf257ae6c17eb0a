"""A model that is read one tensor at a time, in one process, whatever its format."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_api.errors import InvalidModelError
from dpo_api.models import ModelConfig
from dpo_api.models.folder import Files
from dpo_api.models.megatron.outgoing import NOT_COMPUTED
from dpo_trainer.formats.huggingface import open_weights
from dpo_trainer.formats.layout import Slot, assemble, slots
from dpo_trainer.formats.safetensors_reader import DTYPES
from dpo_trainer.formats.weights import Weights


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

    @classmethod
    def open(cls, files: Files, uri: str, config: ModelConfig, dtype: torch.dtype | None = None) -> "Whole":
        """Read the headers of the weights. Raises InvalidModelError if they are not those of the configuration."""
        weights = open_weights(files, uri)
        weights.check(config)
        return cls(files, uri, config, weights, dtype)

    @property
    def slots(self) -> list[Slot]:
        """Every parameter of the model, in its order."""
        return list(slots(self.config, range(self.config.num_layers), first=True, last=True))

    @property
    def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors under Hugging Face's names, with their shapes."""
        for slot in self.slots:
            yield from zip(slot.sources, slot.shapes, strict=True)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type that a tensor is written in."""
        return self.dtype or DTYPES[self.weights.info(name).dtype]

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor in the type that it is written in."""
        return self.weights.read(name).to(self.dtype_of(name))

    def parameter(self, slot: Slot) -> Tensor:
        """Read one of Megatron-Core's parameters, in the widest type of the tensors that it is made of."""
        found = assemble(slot, self.config, self.weights.read, 0, 1)
        return found if self.dtype is None else found.to(self.dtype)


def compare(source: Whole, written: Whole) -> None:
    """Compare what both compute: the configuration, and each parameter bit by bit.

    Raises InvalidModelError for what differs.
    """
    ours, theirs = (_computed(model.config) for model in (source, written))
    for name, value in ours.items():
        if theirs[name] != value:
            raise InvalidModelError(f"{written.uri}: its {name} is {theirs[name]}, that of {source.uri} {value}")
    for here, there in zip(source.slots, written.slots, strict=True):
        if not torch.equal(source.parameter(here), written.parameter(there)):
            raise InvalidModelError(
                f"{written.uri}: {here.parameter} is not that of {source.uri}; delete it and convert again"
            )


def _computed(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that change a logit."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_COMPUTED}
