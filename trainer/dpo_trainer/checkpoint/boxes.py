"""Cuts flat ranges of parameters into boxes of the whole model's tensors.

A rank of the distributed optimizer holds a range of each flattened parameter: [start, end) of the elements of its
tensor-parallel part, in row-major order. A checkpoint holds boxes, which have a place in the whole tensor and can be
read in any other layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Size, Tensor

Rectangle = tuple[tuple[int, ...], tuple[int, ...], int]
"""(first index on each axis, size on each axis, flat index of the first element)."""


@dataclass(frozen=True)
class Box:
    """A part of one of the model's tensors, which this rank holds."""

    key: str  #: Megatron-Core's name of the whole tensor, with the state's name in front
    offsets: tuple[int, ...]  #: its place in the whole tensor
    whole: tuple[int, ...]  #: shape of the whole tensor
    values: Tensor  #: fp32, of the box's shape: a view of the optimizer's live state


@dataclass(frozen=True)
class Piece:
    """A contiguous part of a parameter, and its place in the whole model's tensor of that name.

    Most parameters are one piece. The MLP's first matrix is two: its rows of the gate and of the up projection, which
    are far apart in the whole matrix.
    """

    key: str
    first: int  #: flat index, in the parameter, of its first element
    shape: tuple[int, ...]
    offsets: tuple[int, ...]  #: one for each axis of ``whole``, which may have more axes in front: of layers
    whole: tuple[int, ...]
    duplicate: bool  #: another tensor-parallel rank or pipeline stage has the same values, and saves them

    def boxes(self, prefix: str, start: int, values: Tensor) -> Iterator[Box]:
        """Yield the boxes of a state's ``values`` [n] that belong to the elements from ``start`` of the parameter."""
        low = max(start, self.first)
        high = min(start + values.numel(), self.first + Size(self.shape).numel())
        more = len(self.whole) - len(self.shape)
        for at, size, place in rectangles(self.shape, low - self.first, high - self.first):
            first = place + self.first - start
            offsets = self.offsets[:more] + tuple(a + b for a, b in zip(self.offsets[more:], at, strict=True))
            box = values[first : first + Size(size).numel()].view((1,) * more + size)
            yield Box(prefix + self.key, offsets, self.whole, box)


def rectangles(shape: tuple[int, ...], start: int, end: int) -> Iterator[Rectangle]:
    """Yield at most three rectangles that tile [start, end) of a row-major [rows, columns], or one of an [n]."""
    if len(shape) == 1:
        if start < end:
            yield (start,), (end - start,), start
        return
    _, columns = shape
    at = start
    while at < end:
        row, column = divmod(at, columns)
        rows = (end - at) // columns
        if column or not rows:
            last = min(end, (row + 1) * columns)
            yield (row, column), (1, last - at), at
        else:
            last = at + rows * columns
            yield (row, 0), (rows, columns), at
        at = last


def pieces(parameter: Tensor, entry: Any, vocabulary: int) -> Iterator[Piece]:
    """Yield the pieces of a parameter, from its entry in Megatron-Core's sharded state dict.

    vocabulary: its true size. Rows from there on are padding, whose number depends on the layout: no piece has them.
    """
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    for part in [built] if isinstance(built, ShardedTensor) else built:
        shape, whole = tuple(part.data.shape), part.global_shape
        # Only the embedding and the head have rows that other sizes of tensor parallelism do not have.
        if part.allow_shape_mismatch and whole[0] > vocabulary:
            rows = max(0, min(shape[0], vocabulary - part.global_offset[0]))
            shape, whole = (rows, *shape[1:]), (vocabulary, *whole[1:])
        yield Piece(
            key=part.key,
            first=part.data.storage_offset() - parameter.storage_offset(),
            shape=shape,
            offsets=tuple(part.global_offset),
            whole=tuple(whole),
            duplicate=any(part.replica_id[:2]),
        )
