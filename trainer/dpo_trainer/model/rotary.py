"""Rotary position embedding by the pack's own position ids (Su et al., RoFormer, 2021; half-split form).

GPTModel's own rotary takes the stream's order and ignores position ids, so it is not used.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_api.models import ModelConfig, YarnScaling
from dpo_trainer.kernels.usable import computes
from dpo_trainer.model.varlen import VarlenPlan, spread


def all_frequencies(config: ModelConfig) -> tuple[Tensor, tuple[float, ...]]:
    """Inverse frequencies, fp32 [ropes, rotary_dim / 2], and factor of each rotary embedding (``ModelConfig.rope_of``).

    The factor is what rotated queries and keys are multiplied by: 1 but for YaRN.
    """
    scaling = config.rope_scaling
    factor = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    if config.local_rope_theta is None:
        return inverse_frequencies(config)[None], (factor,)
    local = replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
    return torch.stack([inverse_frequencies(config), inverse_frequencies(local)]), (factor, 1.0)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The rotation per position of each pair of channels that turns, fp32 [rotary_dim / 2], radians per token."""
    turned, scaling = config.rotary_dim or config.head_dim, config.rope_scaling
    exponents = torch.arange(0, turned, 2, dtype=torch.int64).float() / turned
    waves = config.rope_theta**exponents
    frequencies = 1.0 / waves
    if scaling is None:
        return frequencies
    if isinstance(scaling, YarnScaling):
        keep = _kept_by_yarn(turned, config.rope_theta, scaling)
        return (1 - keep) / (scaling.factor * waves) + keep * frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: long waves are stretched, short ones kept, those between blended by how often they fit into the
    # context.
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / scaling.factor
    fits = scaling.original_max_positions / wavelengths
    keep = ((fits - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - keep) * stretched + keep * frequencies


def _kept_by_yarn(turned: int, theta: float, scaling: YarnScaling) -> Tensor:
    """How much of each pair's own frequency YaRN keeps, fp32 [rotary_dim / 2], from 1 to 0.

    Pair i turns L / (2π · theta^(2i / rotary_dim)) times in the L tokens of the original context.
    """
    ends = [
        turned * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    first, last = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.truncate else ends
    first, last = max(first, 0), min(last, turned - 1)
    width = last - first or 0.001  # transformers' own, where the blend has no width
    return 1 - ((torch.arange(turned // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def rotation(position_ids: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles times ``factor``, both fp32 [S, 1, rotary_dim / 2] (the 1 stands for the heads).

    position_ids: [S]; frequencies: fp32 [rotary_dim / 2].
    """
    angles = position_ids.to(torch.float32)[:, None] * frequencies.to(position_ids.device)[None, :]
    cosines, sines = angles.cos(), angles.sin()
    if factor != 1:
        cosines, sines = cosines * factor, sines * factor
    return cosines[:, None, :], sines[:, None, :]


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn channel i with channel i + rotary_dim/2 by their angle, computed in fp32; the channels after them stay.

    x: [S, heads, head_dim]; cosines, sines: fp32 [S, 1, rotary_dim / 2]. Returns x's shape and dtype.
    """
    turned: Tensor = _Rotate.apply(x, cosines, sines)
    return turned


def rotate_and_spread(x: Tensor, cosines: Tensor, sines: Tensor, plan: VarlenPlan) -> Tensor:
    """Turn the stream's keys and copy them into the plan's key rows: [S, groups, d] → [K, groups, d].

    The same as ``spread(rotate(x))``. On a GPU it is one pass, and in the backward pass sums are fp32.
    """
    if not plan.gathers or not computes(x):
        return spread(rotate(x, cosines, sines), plan)
    keys: Tensor = _RotateAndSpread.apply(x, cosines, sines, plan)
    return keys


class _RotateAndSpread(torch.autograd.Function):
    """See ``rotate_and_spread``; for GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor, plan: VarlenPlan) -> Tensor:
        from dpo_trainer.kernels import rotary

        ctx.save_for_backward(cosines, sines)
        ctx.plan = plan
        return rotary.turned(x, cosines, sines, 1, plan.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        from dpo_trainer.kernels import rotary

        cosines, sines = ctx.saved_tensors
        return rotary.turned_back(grad, cosines, sines, ctx.plan.starts, ctx.plan.copies), None, None, None


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is turned back by the same angle, and multiplied as x was: nothing of x is saved."""

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
    if computes(x):
        from dpo_trainer.kernels import rotary

        return rotary.turned(x, cosines, sines, direction)
    half = cosines.shape[-1]
    parts = (half, half, x.shape[-1] - 2 * half)
    first, second, still = x.float().split(parts, dim=-1)
    turned = torch.empty_like(x, dtype=torch.float32)
    to_first, to_second, to_still = turned.split(parts, dim=-1)
    to_still.copy_(still)
    torch.mul(first, cosines, out=to_first).addcmul_(second, sines, value=-direction)
    torch.mul(second, cosines, out=to_second).addcmul_(first, sines, value=direction)
    return turned.to(x.dtype)
