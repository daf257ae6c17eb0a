"""The start model's exact values, read again from its files, where the model in memory is rounded to bf16."""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.models import ModelConfig
from dpo_trainer.formats.huggingface import Checkpoint, stage_slots
from dpo_trainer.formats.layout import assemble, target
from dpo_trainer.formats.safetensors_reader import DTYPES


class StartWeights:
    """Parameters of this rank's part of a model by name, from the files that it was loaded from.

    A file that has changed since then is an ObjectChangedError.
    """

    def __init__(self, gpt: Any, checkpoint: Checkpoint) -> None:
        self._config: ModelConfig = gpt.dpo_config
        self._checkpoint = checkpoint
        self._slots = {slot.parameter: slot for slot in stage_slots(gpt)}
        self._rounded = {
            name for name, slot in self._slots.items() if not self._holds(target(gpt, slot).dtype, slot.sources)
        }

    def rounded(self, name: str) -> bool:
        """Return whether loading may have rounded this parameter, because its type is narrower than the file's."""
        return name in self._rounded

    def value(self, name: str) -> Tensor:
        """Read the parameter from the files, as fp32 on the CPU. Needs memory for this parameter only."""
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        return assemble(self._slots[name], self._config, self._read, rank, size).float()

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        return self._checkpoint.file_of(name).read(name, rows)

    def _holds(self, held: torch.dtype, sources: tuple[str, ...]) -> bool:
        kinds = {DTYPES[self._checkpoint.file_of(name).tensors[name].dtype] for name in sources}
        return held == torch.float32 or kinds == {held}
