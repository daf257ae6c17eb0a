"""Where the numbers of a stored tensor are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpo_api.models.megatron.members import Extent

Form = Literal["raw", "torch", "zlib", "gzip", "zstd"]
"""``raw``: the numbers. ``torch``: a file of ``torch.save`` with one tensor. The others: zarr's compressed chunks."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, in C order: from ``offsets`` on, of ``shape``. It may extend over the tensor's end (zarr)."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    place: Extent
    form: Form = "raw"
    skip: int = 0
    """Numbers in the place before those of the box."""
    numbers: int = 0
    """All numbers of a compressed place."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor, or one tensor-parallel rank's part of it."""

    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def layer(self, index: int) -> Stored:
        """Return entry ``index`` of the first axis as a tensor of one axis less."""
        found = []
        for chunk in self.chunks:
            within = index - chunk.offsets[0]
            if 0 <= within < chunk.shape[0]:
                skip = chunk.skip + within * math.prod(chunk.shape[1:])
                found.append(replace(chunk, offsets=chunk.offsets[1:], shape=chunk.shape[1:], skip=skip))
        return Stored(self.dtype, self.shape[1:], tuple(found))


def whole(dtype: str, shape: Sequence[int], place: Extent) -> Stored:
    """Return a tensor whose numbers are at one place."""
    return Stored(dtype, tuple(shape), (Chunk((0,) * len(shape), tuple(shape), place),))
