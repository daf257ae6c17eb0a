"""The part of the engine's state that a checkpoint holds: fp32 masters and Adam's moments of the trainable parameters.

Each rank saves what its optimizer holds, as views: nothing is gathered or copied. The optimizer's step is that of the
checkpoint's marker.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dpo_trainer import bridge, torch_adam
from dpo_trainer.checkpoint.boxes import Box, Piece, pieces
from dpo_trainer.model.forward import unwrap

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
"""The names of the states. A box's key is the state's name, a full stop, and the parameter's name."""

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Megatron-Core wants a layout to be named; only the places of the model's parameters are read from what it returns."""


def collect(model: Any, optimizer: Any) -> list[Box]:
    """Return the boxes that this rank saves. All ranks' boxes together hold each value once.

    model: without its data-parallel wrapper. Values that several ranks have are saved by one; the whole parameters of
    Megatron-Core's plain optimizer are divided among the data-parallel ranks.
    """
    found: list[Box] = []
    for parameter, parts in _trained(model):
        start, end, states = held(optimizer, parameter)
        if not _is_divided(optimizer):
            rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
            size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
            start, end = end * rank // size, end * (rank + 1) // size
            states = {name: values[start:end] for name, values in states.items()}
        found += _boxes([part for part in parts if not part.duplicate], start, states)
    return found


def restore(model: Any, optimizer: Any, step: int, load: Callable[[list[Box]], None]) -> None:
    """Give a new optimizer the state after ``step`` updates, and the model its weights. A collective.

    load: reads the boxes' values in place.
    """
    torch_adam.allocate(optimizer, step)
    boxes: list[Box] = []
    for parameter, parts in _trained(model):
        start, _, states = held(optimizer, parameter)
        boxes += _boxes(parts, start, states)
    load(boxes)
    with bridge.construction():
        for part in _parts(optimizer):
            copy = getattr(part, "_copy_main_params_to_model_params", None)
            if copy is not None:  # otherwise the model computes with the masters themselves
                copy()
            if _is_divided(part):
                for chunk in part.model_chunks:
                    chunk.start_param_sync(force_sync=True)


def _trained(model: Any) -> Iterator[tuple[Tensor, list[Piece]]]:
    """Yield this rank's trainable parameters with the places of their pieces."""
    with bridge.construction():
        entries = model.sharded_state_dict(metadata=dict(_METADATA))  # Megatron-Core adds to it
    vocabulary = unwrap(model).dpo_config.vocab_size
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield parameter, list(pieces(parameter, entries[name], vocabulary))


def _boxes(parts: list[Piece], start: int, states: dict[str, Tensor]) -> Iterator[Box]:
    for name, values in states.items():
        for part in parts:
            yield from part.boxes(f"{name}.", start, values)


def held(optimizer: Any, parameter: Tensor) -> tuple[int, int, dict[str, Tensor]]:
    """Return the range of the flattened parameter whose state this rank's optimizer holds, and the states, flat."""
    start, end, main = 0, parameter.numel(), parameter
    if _is_divided(optimizer):
        holder = next((part for part in _parts(optimizer) if parameter in part.model_param_gbuf_map), None)
        if holder is None:  # held by other data-parallel ranks only
            return 0, 0, {}
        held = holder._get_model_param_range_map(parameter)["param"]
        group, place = holder.model_param_group_index_map[parameter]
        start, end, main = held.start, held.end, holder.optimizer.param_groups[group]["params"][place]
    elif parameter.dtype != torch.float32:
        main = parameter.main_param  # type: ignore[attr-defined]
    adam = next(part.optimizer.state[main] for part in _parts(optimizer) if main in part.optimizer.state)
    states = {MASTER: main, **{name: adam[name] for name in MOMENTS}}
    return start, end, {name: values.detach().view(-1) for name, values in states.items()}


def _is_divided(optimizer: Any) -> bool:
    """Whether the optimizer is Megatron-Core's distributed one, which divides the state among the ranks."""
    return any(hasattr(part, "model_param_gbuf_map") for part in _parts(optimizer))


def _parts(optimizer: Any) -> list[Any]:
    """Return the optimizers that hold parameters: none on a pipeline stage without trainable ones."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None and not getattr(part, "is_stub_optimizer", False)]
