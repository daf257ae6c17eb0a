"""Context parallelism: the tokens of a pack divided among ranks, each of which has a part of every sequence.

Each sequence's queries are cut in 2C chunks for C ranks, and rank r has chunks r and 2C - 1 - r: the later a chunk, the
more keys it sees, and each of these pairs sees the same number (Dubey et al., The Llama 3 Herd of Models, 2024, section
3.3.2). Ranks gather the keys and values of the whole pack in each layer. The gathered stream holds the ranks' tokens
one rank after the other, so a chunk's keys are intervals of it, and the plan of `varlen` needs no other form.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from dpo_trainer.model.pack import Pack, Segment
from dpo_trainer.model.varlen import Interval, Piece, VarlenPlan, pieces_of, plan_of

Chunks = tuple[tuple[Piece, ...], ...]
"""Rank → its chunks: sequences over the whole pack's stream, in its order. Together they have each token once."""


def chunks_of(segments: tuple[Segment, ...], size: int) -> Chunks:
    """Divide the sequences of a pack among ``size`` ranks. A sequence shorter than 2C gives no token to some ranks."""
    end = max(segment.end for segment in segments)
    found: list[list[Piece]] = [[] for _ in range(size)]
    for whole in pieces_of(segments, end):
        if whole.padding:
            continue
        bounds = [whole.start + whole.length * part // (2 * size) for part in range(2 * size + 1)]
        *before, (first, _) = whole.keys
        parts = [Piece(start, stop, (*before, (first, stop))) for start, stop in pairwise(bounds)]
        for rank, own in enumerate(found):
            own += [part for part in (parts[rank], parts[2 * size - 1 - rank]) if part.length]
    return tuple(tuple(own) for own in found)


def share_of(pack: Pack, rank: int, size: int, pad_to_multiple: int = 1) -> Pack:
    """Return a rank's share of a whole pack: its tokens, and the rows among them that predict a response token.

    All ranks' shares are padded to one length, a multiple of ``pad_to_multiple``.
    """
    if size == 1:
        return pack
    chunks = chunks_of(pack.segments, size)
    longest = max(1, *(sum(chunk.length for chunk in own) for own in chunks))
    none = torch.empty(0, dtype=torch.int64)
    mine = torch.cat([none, *(torch.arange(chunk.start, chunk.end) for chunk in chunks[rank])])
    pad = (0, longest + -longest % pad_to_multiple - len(mine))
    place = torch.full((pack.length,), -1).index_copy(0, mine, torch.arange(len(mine)))
    rows = place[pack.rows]
    held = rows >= 0
    return replace(
        pack,
        tokens=F.pad(pack.tokens[mine], pad),
        position_ids=F.pad(pack.position_ids[mine], pad),
        origins=F.pad(pack.origins[mine], pad, value=-1),
        rows=rows[held],
        labels=pack.labels[held],
        owners=pack.owners[held],
        context_rank=rank,
        context_size=size,
    )


def sequences_of(pack: Pack) -> tuple[Piece, ...]:
    """Return the sequences of a pack's tokens over the stream of all ranks' tokens, one rank after the other."""
    if pack.context_size == 1:
        return pieces_of(pack.segments, pack.length)
    chunks = chunks_of(pack.segments, pack.context_size)
    held: list[tuple[int, int, int]] = []  # of the whole stream: [first, last) and how far away it is in the gathered
    for rank, own in enumerate(chunks):
        cursor = rank * pack.length
        for chunk in own:
            held.append((chunk.start, chunk.end, cursor - chunk.start))
            cursor += chunk.length
    held.sort()
    firsts = [first for first, _, _ in held]

    def moved(interval: Interval) -> Iterator[Interval]:
        low, high = interval
        for first, last, by in held[bisect_right(firsts, low) - 1 : bisect_left(firsts, high)]:
            yield max(first, low) + by, min(last, high) + by

    cursor = pack.context_rank * pack.length
    end = cursor + pack.length
    found: list[Piece] = []
    for chunk in chunks[pack.context_rank]:
        keys = tuple(part for interval in chunk.keys for part in moved(interval))
        found.append(Piece(cursor, cursor + chunk.length, keys))
        cursor += chunk.length
    if cursor < end:
        found.append(Piece(cursor, end, ((cursor, end),), padding=True))
    return tuple(found)


def plan_of_pack(pack: Pack) -> VarlenPlan:
    """Return the plan of a pack's attention, on the CPU: this rank's sequences, over the keys of all ranks."""
    return plan_of(sequences_of(pack), pack.context_size * pack.length)


def gathered(x: Tensor, pack: Pack) -> Tensor:
    """Gather the keys or values of the whole pack: [S, groups, d] → [C · S, groups, d], one rank after the other.

    A collective of the context-parallel ranks. The gradient of a row is the sum over the ranks.
    """
    if pack.context_size == 1:
        return x
    whole: Tensor = gather_from_sequence_parallel_region(x, group=parallel_state.get_context_parallel_group())
    return whole
