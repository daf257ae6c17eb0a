"""Dropout whose mask is a function of what an element is, not of the order in which elements are drawn.

Whether an element is kept depends on the seed, the step, the token (its pair's dataset index, side and position), the
layer, the module and the channel. So there is no generator state, and the mask is the same under every layout, packing
and recomputation, and after a resume. The function is an integer hash: the token's key and the channel's, each mixed
by SplitMix64's finaliser (Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators, 2014), are joined by
exclusive or and mixed once more. int64 products wrap, on every device that torch has.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_trainer.model.pack import Pack

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LARGEST = 1 << 22
"""Most elements that are hashed at a time: 32 MiB."""


def key_of(*parts: object) -> int:
    """Return 64 bits, as a signed number, that depend on all parts: what a seed, a step or a layer adds to a hash."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


class TokenKeys:
    """The keys of the tokens that the model computes now, shared by its adapters.

    Megatron-Core passes the pack to attention only, so ``forward`` sets its keys: before the forward pass, and again
    before the backward pass, which recomputes layers when a pipeline stage may have seen other packs since.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None

    def set(self, keys: Tensor) -> None:
        """Set the keys of the pack whose forward or backward pass starts, int64 [S]."""
        self._keys = keys

    def now(self) -> Tensor:
        """Return the keys, int64 [S]. Raises RuntimeError if no pass has set them."""
        if self._keys is None:
            raise RuntimeError("dropout needs the seed of the step: pass dropout_seed to hidden_rows")
        return self._keys


def token_keys(pack: Pack, seed: int) -> Tensor:
    """Return each token's key, int64 [S]. seed: of the run and the step, from ``key_of``."""
    return _mixed(_mixed(pack.origins + seed) + pack.position_ids)


def channel_keys(channels: Tensor, key: int) -> Tensor:
    """Return each channel's key, int64 [C]. channels: int64, of the whole model; key: the layer's and module's."""
    return _mixed(_mixed(channels) + key)


def dropout(x: Tensor, tokens: Tensor, channels: Tensor, probability: float) -> Tensor:
    """Zero each element with this probability and scale the others by 1 / (1 - probability).

    x: [S, 1, C]; tokens: ``token_keys`` of its S rows; channels: ``channel_keys`` of its C columns. Nothing but the
    keys is saved for the backward pass.
    """
    dropped: Tensor = _Dropout.apply(x, tokens, channels, probability)
    return dropped


def kept(tokens: Tensor, channels: Tensor, probability: float) -> Tensor:
    """Return which elements are kept, bool [S, C]."""
    mixed = (tokens[:, None] ^ channels[None, :]).mul_(_signed(_FIRST))
    mixed.bitwise_xor_(mixed >> 32).mul_(_signed(_SECOND))
    return mixed >= round(probability * 2**64) - 2**63


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, channels: Tensor, probability: float) -> Tensor:
        ctx.save_for_backward(tokens, channels)
        ctx.probability = probability
        return _drop(x, tokens, channels, probability)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, channels = ctx.saved_tensors
        return _drop(grad, tokens, channels, ctx.probability), None, None, None


def _drop(x: Tensor, tokens: Tensor, channels: Tensor, probability: float) -> Tensor:
    out = torch.empty_like(x)
    step = max(1, _LARGEST // len(channels))
    for start in range(0, len(tokens), step):
        rows = slice(start, start + step)
        torch.mul(x[rows], kept(tokens[rows], channels, probability).unsqueeze(1), out=out[rows])
    return out.mul_(1 / (1 - probability))


def _mixed(keys: Tensor) -> Tensor:
    """SplitMix64: a step of the generator and its finaliser, int64."""
    mixed = keys + _signed(_GOLDEN)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return mixed ^ _shifted(mixed, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right as an unsigned number."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
