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
