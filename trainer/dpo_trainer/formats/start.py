"""The start model's own values, read again from where it was loaded: what bf16 has rounded is exact there."""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.models import ModelConfig
from dpo_trainer.formats.huggingface import Checkpoint, stage_slots
from dpo_trainer.formats.layout import assemble, target
from dpo_trainer.formats.safetensors_reader import DTYPES


class StartWeights:
    """Parameters of this rank's part of a model by name, from the very files that it was loaded from.

    The files' ETags are those of the loading: one that has changed since is an ObjectChangedError.
    """

    def __init__(self, gpt: Any, checkpoint: Checkpoint) -> None:
        self._config: ModelConfig = gpt.dpo_config
        self._checkpoint = checkpoint
        self._slots = {slot.parameter: slot for slot in stage_slots(gpt)}
        self._rounded = {
            name for name, slot in self._slots.items() if not self._holds(target(gpt, slot).dtype, slot.sources)
        }

    def rounded(self, name: str) -> bool:
        """Whether loading has rounded this parameter: its type cannot hold every value of the file's."""
        return name in self._rounded

    def value(self, name: str) -> Tensor:
        """The parameter as the files have it, in fp32 on the CPU. Reads them; the memory is that of the parameter."""
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        return assemble(self._slots[name], self._config, self._read, rank, size).float()

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        return self._checkpoint.file_of(name).read(name, rows)

    def _holds(self, held: torch.dtype, sources: tuple[str, ...]) -> bool:
        kinds = {DTYPES[self._checkpoint.file_of(name).tensors[name].dtype] for name in sources}
        return held == torch.float32 or kinds == {held}
