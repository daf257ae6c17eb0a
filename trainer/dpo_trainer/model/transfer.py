"""Sends a pack to the GPU with all that a pass over it needs, in one copy for which the host does not wait.

Each copy from ordinary memory makes the host wait until the GPU has done all work before it. A pass would wait a dozen
times: for tokens and positions, for the plan of attention, for the pairs' reference sums and rewards.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dpo_trainer.model.context import plan_of_pack
from dpo_trainer.model.pack import Pack
from dpo_trainer.model.varlen import VarlenPlan

ALIGNMENT = 16
"""Bytes: each tensor starts at a multiple of this, as kernels that read several elements at a time want it."""


def loaded(pack: Pack, constants: Sequence[Tensor], device: torch.device) -> tuple[Pack, list[Tensor]]:
    """Return a pack with its plan, and further tensors of any shapes and dtypes, all on ``device``."""
    plan = plan_of_pack(pack)
    if device.type == "cpu":
        return replace(pack, plan=plan), list(constants)
    of_pack, of_plan = _tensors(pack), _tensors(plan)
    repeats = [part for pair in plan.repeats for part in pair]
    sent = iter(sent_at_once([*of_pack.values(), *of_plan.values(), *repeats, *constants], device))
    there: dict[str, Any] = {name: next(sent) for name in of_pack}
    of_attention: dict[str, Any] = {name: next(sent) for name in of_plan}
    of_attention["repeats"] = tuple((next(sent), next(sent)) for _ in plan.repeats)
    return replace(pack, **there, plan=replace(plan, **of_attention)), list(sent)


def _tensors(record: Pack | VarlenPlan) -> dict[str, Tensor]:
    """Return the fields of a data class that are tensors, by name."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def sent_at_once(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return copies on ``device`` that are parts of one buffer; nothing waits for the transfer but the GPU itself."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    # torch keeps a pinned buffer until the copies from it are done.
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, tensors, strict=False):
        _part(buffer, start, tensor).copy_(tensor)
    there = buffer.to(device, non_blocking=True)
    return [_part(there, start, tensor) for start, tensor in zip(starts, tensors, strict=False)]


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the bytes of a buffer from ``start`` on as a tensor of that shape and dtype."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
