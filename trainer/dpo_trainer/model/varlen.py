"""Attention over a pack as a batch of sequences of several lengths: which tokens ask, and which tokens they see.

A prompt and the response that follows it are one causal sequence. Every other response is a sequence of its own queries
against the keys of its parent and its own. So the FLOPs depend on the pairs, not on the length of the pack, and no
sequence needs a mask: the queries of each are the last of its keys (FlashAttention's causal mask, aligned to the lower
right corner; Dao, FlashAttention-2, 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_trainer.model.pack import Segment

Interval = tuple[int, int]
"""Rows [first, last) of the stream."""

Masks = Sequence[Tensor | None]
"""For each sequence: None for causal, or what is added to the scores, [L, K] in the queries' dtype."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The queries [start, end) of the stream and the keys that they see: one sequence.

    ``keys``: intervals of the stream, in order. The last one ends with the queries. Query i of L sees the first
    K - L + i + 1 of the K keys. ``padding``: belongs to no segment, gets zeros.
    """

    start: int
    end: int
    keys: tuple[Interval, ...]
    padding: bool = False

    @property
    def length(self) -> int:
        """Number of queries, L."""
        return self.end - self.start

    @property
    def key_count(self) -> int:
        """Number of keys, K ≥ L."""
        return sum(last - first for first, last in self.keys)


def pieces_of(segments: tuple[Segment, ...], size: int) -> tuple[Piece, ...]:
    """Cut a stream of ``size`` tokens into sequences, in the stream's order and without gaps."""
    pieces: list[Piece] = []
    cursor, index = 0, 0
    while index < len(segments):
        segment = segments[index]
        if segment.start > cursor:
            pieces.append(Piece(cursor, segment.start, ((cursor, segment.start),), padding=True))
        end = segment.end
        keys: tuple[Interval, ...] = ((segment.start, end),)
        if segment.parent is None:
            follower = segments[index + 1] if index + 1 < len(segments) else None
            if follower is not None and follower.parent == index and follower.start == end:
                # One causal sequence of both is right for the parent and for its first child.
                index += 1
                end, keys = follower.end, ((segment.start, follower.end),)
        else:
            parent = segments[segment.parent]
            keys = ((parent.start, parent.end), *keys)
        pieces.append(Piece(segment.start, end, keys))
        cursor = end
        index += 1
    if cursor < size:
        pieces.append(Piece(cursor, size, ((cursor, size),), padding=True))
    return tuple(pieces)


@dataclass(frozen=True)
class VarlenPlan:
    """The index plan of one attention call over N sequences, in the form of FlashAttention's varlen functions.

    Queries stay in the stream's order. Keys are copied where a second sequence sees them: K rows in all.
    """

    pieces: tuple[Piece, ...]  #: [N]
    cu_q: Tensor  #: [N + 1] int32, where each sequence's queries start, and S
    cu_k: Tensor  #: [N + 1] int32, where each sequence's keys start, and K
    max_q: int  #: the longest sequence's queries
    max_k: int  #: and keys
    keys: Tensor  #: [K] int64, the stream row of each key row
    home: Tensor  #: [S] int64, the first key row of each stream row (0 for those that no sequence sees)
    unseen: Tensor  #: int64, the stream rows that no sequence sees
    copies: Tensor  #: [K] int64, the key rows ordered by the stream row that they copy
    starts: Tensor  #: [S + 1] int64, where the copies of each stream row start in ``copies``, and K
    repeats: tuple[tuple[Tensor, Tensor], ...]
    """(stream rows, their second key rows), then their third, and so on: int64, no row twice in one tensor."""
    _masks: dict[tuple[int, torch.dtype], Masks] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_padding(self) -> bool:
        """Whether no sequence holds tokens: a context-parallel rank may have none of a short pack."""
        return all(piece.padding for piece in self.pieces)

    def masks(self, window: int | None, like: Tensor) -> Masks:
        """Each sequence's mask of ``like``'s dtype and device; None where the window leaves every key in sight.

        Made once for all layers of a window: a mask is as large as the scores of one head.
        """
        if window is None:
            return [None] * len(self.pieces)
        found = self._masks.get((window, like.dtype))
        if found is None:
            sizes = [None if piece.padding else (piece.length, piece.key_count) for piece in self.pieces]
            made = {pair: window_mask(*pair, window, like) for pair in set(sizes) if pair}
            found = self._masks[window, like.dtype] = [None if pair is None else made[pair] for pair in sizes]
        return found

    @property
    def gathers(self) -> bool:
        """Whether key rows differ from stream rows."""
        return bool(self.repeats) or len(self.unseen) > 0

    def to(self, device: torch.device | str) -> "VarlenPlan":
        """The same plan with its tensors on ``device``."""
        return replace(
            self,
            cu_q=self.cu_q.to(device),
            cu_k=self.cu_k.to(device),
            keys=self.keys.to(device),
            home=self.home.to(device),
            unseen=self.unseen.to(device),
            copies=self.copies.to(device),
            starts=self.starts.to(device),
            repeats=tuple((rows.to(device), again.to(device)) for rows, again in self.repeats),
        )


def plan_of(pieces: Sequence[Piece], size: int) -> VarlenPlan:
    """Return the plan of these sequences over a stream of ``size`` keys, on the CPU."""
    queries = [piece.length for piece in pieces]
    counts = [piece.key_count for piece in pieces]
    keys = torch.cat([torch.arange(first, last) for piece in pieces for first, last in piece.keys])
    # Key rows ordered by the stream row that they copy: the j-th of a row's copies belongs to the j-th round.
    copied, order = keys.sort(stable=True)
    uses = torch.bincount(keys, minlength=size)
    starts = uses.cumsum(0) - uses
    turn = torch.arange(len(keys)) - starts[copied]
    home = torch.zeros(size, dtype=torch.int64)
    home[copied[turn == 0]] = order[turn == 0]
    rounds = range(1, int(uses.max()))
    return VarlenPlan(
        pieces=tuple(pieces),
        cu_q=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        cu_k=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        max_q=max(queries),
        max_k=max(counts),
        keys=keys,
        home=home,
        unseen=(uses == 0).nonzero().squeeze(1),
        copies=order,
        starts=F.pad(uses.cumsum(0), (1, 0)),
        repeats=tuple((copied[turn == j], order[turn == j]) for j in rounds),
    )


def window_mask(queries: int, keys: int, window: int, like: Tensor) -> Tensor | None:
    """What is added to a sequence's scores when each query sees itself and the ``window`` - 1 keys before it.

    Returns [queries, keys], 0 or -inf, of ``like``'s dtype and device; None if no query has more keys than that.
    """
    if keys <= window:
        return None
    before = keys - queries
    rows = torch.arange(before, keys, device=like.device)[:, None]
    columns = torch.arange(keys, device=like.device)[None, :]
    visible = (columns <= rows) & (rows - columns < window)
    # GPU kernels read rows that start at multiples of 8 elements; others are copied at every call.
    mask = like.new_zeros(queries, -(-keys // 8) * 8)[:, :keys]
    return mask.masked_fill_(~visible, float("-inf"))


def spread(x: Tensor, plan: VarlenPlan) -> Tensor:
    """Copy the stream's keys or values into the plan's key rows: [S, groups, d] → [K, groups, d]."""
    if not plan.gathers:
        return x
    spread_out: Tensor = Spread.apply(x, plan)
    return spread_out


class Spread(torch.autograd.Function):
    """x[plan.keys]. The gradient of a row is the sum over its copies, added in a fixed order without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: VarlenPlan) -> Tensor:
        """x: [S, …]. Returns [K, …]."""
        ctx.plan = plan
        return x.index_select(0, plan.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """grad: [K, …]. Returns [S, …]."""
        plan: VarlenPlan = ctx.plan
        total = grad.index_select(0, plan.home)
        if len(plan.unseen):
            total.index_fill_(0, plan.unseen, 0.0)
        for rows, again in plan.repeats:
            total.index_copy_(0, rows, total.index_select(0, rows) + grad.index_select(0, again))
        return total, None
