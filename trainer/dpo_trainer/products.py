"""Matrix products that are added to a gradient in fp32."""

from functools import cache

import torch
from torch import Tensor

PRODUCT_BYTES = 64 * 2**20
"""Most bytes of a bf16 product that is added to an fp32 gradient where the GEMM itself cannot add it."""


@cache
def _adds_in_fp32(device: torch.device) -> bool:
    """Whether a GEMM of bf16 can add to an fp32 matrix on this device: torch has it on CUDA only."""
    if device.type != "cuda":
        return False
    total, ones = torch.ones(8, 8, device=device), torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 9).all())


def add_product(total: Tensor, matrix: Tensor, rows: Tensor, *, first: bool) -> None:
    """total [V, H] += matrixᵀ [V, C] · rows [C, H], where total may be fp32 and the operands bf16; = if ``first``."""
    beta = 0 if first else 1
    if matrix.dtype == total.dtype:
        total.addmm_(matrix.t(), rows, beta=beta)
        return
    if _adds_in_fp32(total.device):
        torch.addmm(total, matrix.t(), rows, out_dtype=torch.float32, beta=beta, out=total)
        return
    # The product exists in bf16 before it is added, so it is computed in blocks: else it would be a second [V, H].
    block = max(1, PRODUCT_BYTES // (matrix.element_size() * total.shape[1]))
    for start in range(0, total.shape[0], block):
        product = matrix[:, start : start + block].t() @ rows
        part = total[start : start + block]
        part.copy_(product) if first else part.add_(product)


def main_grad_of(weight: Tensor) -> Tensor | None:
    """Return the fp32 buffer that Megatron-Core's DistributedDataParallel gave to a parameter, or None."""
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    return buffer


def hand_over(weight: Tensor) -> None:
    """Mark in a backward pass that an operation has added its gradient of ``weight`` to ``main_grad`` itself.

    The operation returns None to autograd. Megatron-Core's hook adds ``grad`` to ``main_grad``, unless the weight is
    marked; where gradients are reduced meanwhile, it needs a ``grad``. A weight that the embedding uses too
    (``zero_out_wgrad``) gets its gradient from there, and that must be added. Others get zeros that take no memory.
    """
    if not getattr(weight, "zero_out_wgrad", False):
        weight.grad = weight.new_zeros(()).expand_as(weight)
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined] # Megatron-Core's name
