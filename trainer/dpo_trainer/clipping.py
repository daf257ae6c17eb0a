"""The norm and the scaling of gradients for Megatron-Core, where neither Transformer Engine nor Apex has kernels.

Megatron-Core's own forms read the norm of each parameter's gradient on the host, which waits for the GPU each time, and
make a scaled copy of each gradient. These do neither.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor

Lists = Sequence[list[Tensor]]


def norm(_chunk: int, _overflow: Tensor, lists: Lists, _of_each: bool, *_: Any) -> tuple[Tensor, None]:
    """Return the 2-norm of all tensors of ``lists[0]`` as one vector, [1] in fp32 on their device."""
    return torch.stack(torch._foreach_norm(lists[0])).float().norm().reshape(1), None


def scale(_chunk: int, _overflow: Tensor, lists: Lists, factor: float) -> None:
    """Multiply the tensors of ``lists[1]`` with ``factor``, in place. ``lists[0]`` are the same tensors."""
    torch._foreach_mul_(lists[1], factor)


def use() -> None:
    """Let Megatron-Core use these from now on, in the place of its own."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = scale
