"""The start model's exact values, read again from its files, where the model in memory is rounded to bf16."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.models import ModelConfig
from dpo_trainer.formats.delivery import deliver
from dpo_trainer.formats.huggingface import stage_slots
from dpo_trainer.formats.layout import assemble, target
from dpo_trainer.formats.safetensors_reader import DTYPES
from dpo_trainer.formats.weights import Weights


class StartWeights:
    """Parameters of this rank's part of a model by name, from the files that it was loaded from.

    A file that has changed since then is an ObjectChangedError.
    """

    def __init__(self, gpt: Any, weights: Weights) -> None:
        self._gpt = gpt
        self._config: ModelConfig = gpt.dpo_config
        self._rank = parallel_state.get_tensor_model_parallel_rank()
        self._size = parallel_state.get_tensor_model_parallel_world_size()
        self._weights = weights
        self._slots = {slot.parameter: slot for slot in stage_slots(gpt)}
        self._rounded = {
            name for name, slot in self._slots.items() if not self._holds(target(gpt, slot).dtype, slot.sources)
        }

    def rounded(self, name: str) -> bool:
        """Return whether loading may have rounded this parameter, because its type is narrower than the file's."""
        return name in self._rounded

    def value(self, name: str) -> Tensor:
        """Read this rank's part of the parameter from the files, as fp32 on the CPU. Memory: twice the part."""
        return assemble(self._slots[name], self._config, self._weights.read, self._rank, self._size).float()

    def deliver(self, names: Collection[str], use: Callable[[str, Tensor], object]) -> None:
        """Read these parameters again, each byte once, and give each rank's part to ``use``, as fp32 on the CPU.

        A collective of all ranks; ``names``: the same on all ranks of a pipeline stage.
        """
        deliver(
            self._config,
            self._weights,
            [slot for name, slot in self._slots.items() if name in names],
            lambda slot: torch.empty(target(self._gpt, slot).shape),
            lambda slot, part: use(slot.parameter, part),
        )

    def _holds(self, held: torch.dtype, sources: tuple[str, ...]) -> bool:
        kinds = {DTYPES[self._weights.info(name).dtype] for name in sources}
        return held == torch.float32 or kinds == {held}
