"""Rotary position embedding by the pack's own position ids (Su et al., RoFormer, 2021; half-split form).

GPTModel's own rotary takes the stream's order and ignores position ids, so it is not used.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_api.models import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The rotation per position of each pair of channels that turns, fp32 [rotary_dim / 2], radians per token."""
    turned = config.rotary_dim or config.head_dim
    exponents = torch.arange(0, turned, 2, dtype=torch.int64).float() / turned
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: long waves are stretched, short ones kept, those between blended by how often they fit into the
    # context.
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / scaling.factor
    fits = scaling.original_max_positions / wavelengths
    keep = ((fits - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - keep) * stretched + keep * frequencies


def rotation(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, both fp32 [S, 1, rotary_dim / 2] (the 1 stands for the heads).

    position_ids: [S]; frequencies: fp32 [rotary_dim / 2].
    """
    angles = position_ids.to(torch.float32)[:, None] * frequencies.to(position_ids.device)[None, :]
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn channel i with channel i + rotary_dim/2 by their angle, computed in fp32; the channels after them stay.

    x: [S, heads, head_dim]; cosines, sines: fp32 [S, 1, rotary_dim / 2]. Returns x's shape and dtype.
    """
    turned: Tensor = _Rotate.apply(x, cosines, sines)
    return turned


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is turned back by the same angle: nothing of x is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(x, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turned(grad, cosines, sines, -1), None, None


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, direction: int) -> Tensor:
    half = cosines.shape[-1]
    parts = (half, half, x.shape[-1] - 2 * half)
    first, second, still = x.float().split(parts, dim=-1)
    turned = torch.empty_like(x, dtype=torch.float32)
    to_first, to_second, to_still = turned.split(parts, dim=-1)
    to_still.copy_(still)
    torch.mul(first, cosines, out=to_first).addcmul_(second, sines, value=-direction)
    torch.mul(second, cosines, out=to_second).addcmul_(first, sines, value=direction)
    return turned.to(x.dtype)
