"""LoRA adapters in PEFT's format as part of a start model."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpo_api.learning import LoraLinear
from dpo_api.models import ModelConfig
from dpo_api.models.adapter import PREFIX, WEIGHTS, Adapter
from dpo_store import join_uri
from dpo_trainer.formats import weights
from dpo_trainer.formats.layout import assemble, slots
from dpo_trainer.formats.safetensors_reader import RangeStore, SafetensorsFile, TensorInfo, bytes_of


class AdapterMatrices:
    """The matrices of an adapter by Hugging Face's name of the linear layer. Safe for threads."""

    def __init__(self, store: RangeStore, adapter: Adapter) -> None:
        """Raises InvalidModelError for a damaged file."""
        self.adapter = adapter
        self._file = SafetensorsFile(store, join_uri(adapter.uri, WEIGHTS))

    def a(self, layer: str) -> Tensor:
        """Return A, [rank, inputs] fp32."""
        return self._file.read(f"{PREFIX}{layer}.lora_A.weight").float()

    def b(self, layer: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return B, or some of its rows, [outputs, rank] fp32."""
        return self._file.read(f"{PREFIX}{layer}.lora_B.weight", rows).float()

    def digest(self) -> str:
        """Return the sha256 of the adapter's content: its scale, and each matrix's name and values in fp32."""
        found = hashlib.sha256(f"{self.adapter.scale!r}\n".encode())
        for layer in self.adapter.targets:
            for matrix in (self.a(layer), self.b(layer)):
                found.update(f"{layer} {list(matrix.shape)}\n".encode())
                for block in bytes_of(matrix):
                    found.update(block)
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Joined:
    """The adapters of the projections of one of our fused linear layers, side by side. All fp32.

    B's rows are in the order of the fused weight. A row of projection i is multiplied with A_i x alone. A projection
    without an adapter has zeros, which stay zeros: the gradient of each matrix is a product with the other one.
    """

    a: Tensor  #: [projections · rank, inputs]: A_0, A_1, …
    b: Tensor  #: [outputs, rank]
    owners: Tensor  #: [outputs, projections]: 1 for the projection that the row is of, else 0


def projections_of(config: ModelConfig, layer: int, module: LoraLinear) -> tuple[str, ...]:
    """Return Hugging Face's names of the linear layers that one of ours is made of, without ``.weight``."""
    names = config.row.tensors
    return tuple(f"{names.layer(layer)}.{name}" for name in names.projections(module))


def joined(matrices: AdapterMatrices, config: ModelConfig, layer: int, module: LoraLinear) -> Joined:
    """Read the adapters of one of our linear layers, of which at least one projection has one."""
    of, rank, targets = projections_of(config, layer, module), matrices.adapter.rank, matrices.adapter.targets
    slot = next(s for s in slots(config, [layer], first=False, last=False) if s.sources[0] == f"{of[0]}.weight")
    (inputs,) = {shape[1] for shape in slot.shapes}
    outputs = [shape[0] for shape in slot.shapes]
    a = [matrices.a(name) if name in targets else torch.zeros(rank, inputs) for name in of]
    b = [matrices.b(name) if name in targets else torch.zeros(n, rank) for name, n in zip(of, outputs, strict=True)]
    owners = [row.expand(count, -1) for row, count in zip(torch.eye(len(of)), outputs, strict=True)]

    def fused(parts: list[Tensor]) -> Tensor:
        def read(name: str, rows: tuple[int, int] | None) -> Tensor:
            return parts[slot.sources.index(name)][slice(*(rows or (None,)))]

        return assemble(replace(slot, shapes=tuple(tuple(part.shape) for part in parts)), config, read, 0, 1)

    return Joined(torch.cat(a), fused(b), fused(owners))


def with_adapter(model: str, adapter: str) -> str:
    """Return the fingerprint of a start model from those of its weights and its adapter; "": it has none."""
    return model if not adapter else hashlib.sha256(f"{model} {adapter}".encode()).hexdigest()


class MergedWeights:
    """A start model's weights with an adapter added, in fp32: W + scale · B A.

    On one machine a row has the same bits whatever rows are read with it. What ``watch`` receives are the bytes of W:
    those of the sum depend on the machine that adds.
    """

    ROWS = 256
    """Rows of B A that are made at a time, from a multiple of it on: a product's last bits depend on their number."""

    def __init__(self, base: weights.Weights, matrices: AdapterMatrices) -> None:
        self._base, self._matrices = base, matrices
        self._targets = {f"{layer}.weight": layer for layer in matrices.adapter.targets}

    @property
    def header_bytes(self) -> int:
        """Bytes read so far of the model's headers."""
        return self._base.header_bytes

    def check(self, config: ModelConfig) -> None:
        """Check the model's own weights; see ``Weights.check``."""
        self._base.check(config)

    def describe(self) -> dict[str, Any]:
        """Describe the model's own weights."""
        return self._base.describe()

    def info(self, name: str) -> weights.TensorInfo:
        """Describe a tensor; the sums are fp32."""
        info = self._base.info(name)
        if name not in self._targets:
            return info
        return TensorInfo("F32", info.shape, 0, 4 * torch.Size(info.shape).numel())

    def read(
        self, name: str, rows: tuple[int, int] | None = None, watch: Callable[[memoryview], object] | None = None
    ) -> Tensor:
        """Read a tensor, or some of its rows; see ``Weights.read``."""
        own = self._base.read(name, rows, watch)
        layer = self._targets.get(name)
        if layer is None:
            return own
        first, last = rows or (0, len(own))
        a, found, outputs = self._matrices.a(layer), own.float(), self.info(name).shape[0]
        for start in range(first // self.ROWS * self.ROWS, last, self.ROWS):
            b = self._matrices.b(layer, (start, min(start + self.ROWS, outputs)))
            low, high = max(first, start), min(last, start + self.ROWS)
            delta = (b @ a)[low - start : high - start]
            found[low - first : high - first] += delta.mul_(self._matrices.adapter.scale)
        return found
