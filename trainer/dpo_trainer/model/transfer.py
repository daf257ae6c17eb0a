"""Sends a pack to the GPU with all that a pass over it needs, in one copy for which the host does not wait.

Each copy from ordinary memory makes the host wait until the GPU has done all work before it. A pass would wait a dozen
times: for tokens and positions, for the plan of attention, for the pairs' reference sums and rewards.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_trainer.model.context import sequences_of
from dpo_trainer.model.pack import Pack
from dpo_trainer.model.varlen import plan_of

ALIGNMENT = 16
"""Bytes: each tensor starts at a multiple of this, as kernels that read several elements at a time want it."""


def loaded(pack: Pack, constants: Sequence[Tensor], device: torch.device) -> tuple[Pack, list[Tensor]]:
    """Return a pack with its plan, and further tensors of any shapes and dtypes, all on ``device``."""
    plan = plan_of(sequences_of(pack), pack.context_size * pack.length)
    if device.type == "cpu":
        return replace(pack, plan=plan), list(constants)
    of_pack = [pack.tokens, pack.position_ids, pack.origins, pack.rows, pack.labels, pack.owners, pack.pairs]
    of_plan = [
        plan.cu_q,
        plan.cu_k,
        plan.keys,
        plan.home,
        plan.unseen,
        *(part for pair in plan.repeats for part in pair),
    ]
    sent = iter(sent_at_once([*of_pack, *of_plan, *constants], device))
    moved = replace(
        pack,
        tokens=next(sent),
        position_ids=next(sent),
        origins=next(sent),
        rows=next(sent),
        labels=next(sent),
        owners=next(sent),
        pairs=next(sent),
        plan=replace(
            plan,
            cu_q=next(sent),
            cu_k=next(sent),
            keys=next(sent),
            home=next(sent),
            unseen=next(sent),
            repeats=tuple((next(sent), next(sent)) for _ in plan.repeats),
        ),
    )
    return moved, list(sent)


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
