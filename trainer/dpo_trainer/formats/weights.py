"""What a run reads of a start model's weights, whatever their format: tensors by Hugging Face's names."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from dpo_api.models import ModelConfig


class TensorInfo(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> str:
        """A key of ``safetensors_reader.DTYPES``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""


class Weights(Protocol):
    """The tensors of a start model under the names that its family has in Hugging Face's format.

    Opening reads the headers only. Safe for threads.
    """

    @property
    def header_bytes(self) -> int:
        """Bytes read so far to know what there is."""

    def check(self, config: ModelConfig) -> None:
        """Raise InvalidModelError naming any tensor that is missing, unexpected, mis-shaped or not a float."""

    def info(self, name: str) -> TensorInfo:
        """Describe a tensor that the model has."""

    def read(
        self, name: str, rows: tuple[int, int] | None = None, watch: Callable[[memoryview], object] | None = None
    ) -> Tensor:
        """Read one tensor, or its rows [rows[0], rows[1]) along the first axis, as a CPU tensor of its own type.

        ``watch`` receives the bytes of what is returned (it may hash them).
        """

    def describe(self) -> dict[str, Any]:
        """Return what is known, of JSON's types, so that other processes need not read the headers."""
