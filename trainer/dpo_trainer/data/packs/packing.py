"""Groups the pairs of one global batch into packs under a token budget, and assigns the packs to ranks.

The result depends only on the pairs' costs, so every tensor- and pipeline-parallel rank builds the same packs. It
decides which tokens share a stream, but does not change the sums of the step.
"""

from collections.abc import Sequence

import numpy as np

Packs = list[list[int]]
"""Each pack lists positions in the global batch. An empty list is a filler pack (zero weight)."""


def pair_cost(prompt: int, chosen: int, rejected: int, *, share: bool) -> int:
    """Return the tokens of a pair in a stream. The prompt counts once if shared, else once per non-empty response."""
    copies = 1 if share or rejected == 0 else 2
    return copies * prompt + chosen + rejected


def _first_fit(
    costs: Sequence[int], order: Sequence[int], max_tokens: int, max_pairs: int | None, bins: int = 0
) -> Packs:
    """Put ``order`` into packs first-fit; with ``bins``, into the least loaded of that many packs."""
    packs: Packs = [[] for _ in range(bins)]
    room = np.full(len(order) + bins, -1, dtype=np.int64)  # [maximum number of packs]; -1: full or not created yet
    room[:bins] = max_tokens
    for position in order:
        cost = costs[position]
        target = int(np.argmax(room) if bins else np.argmax(room >= cost))
        if room[target] < cost:  # does not fit: a pack of its own, even if the pair alone exceeds the budget
            target = len(packs)
            packs.append([])
            room[target] = max_tokens
        packs[target].append(position)
        full = max_pairs is not None and len(packs[target]) >= max_pairs
        room[target] = -1 if full else max(int(room[target]) - cost, 0)
    return packs


def pack_batch(costs: Sequence[int], max_tokens: int, max_pairs: int | None, *, ranks: int = 1) -> Packs:
    """Group a global batch's pairs into packs of at most ``max_tokens`` tokens and ``max_pairs`` pairs.

    First-fit-decreasing by ``costs`` [n] (tokens, see ``pair_cost``), ties in batch order. If the number of packs is
    not a multiple of ``ranks``, the pairs are spread evenly over the next multiple (if there are enough pairs), so that
    no rank is idle while another computes a fuller pack. A pair that exceeds the budget alone gets its own pack.
    """
    if not costs:
        return []
    order = sorted(range(len(costs)), key=lambda position: (-costs[position], position))
    packs = _first_fit(costs, order, max_tokens, max_pairs)
    wanted = min(-(-len(packs) // ranks) * ranks, len(costs))
    if wanted > len(packs):
        even = _first_fit(costs, order, max_tokens, max_pairs, bins=wanted)
        if len(even) == wanted:  # spreading may need more packs than first-fit did; then first-fit's packs are kept
            packs = even
    return [sorted(pack) for pack in packs]


def deal(packs: Packs, pack_tokens: Sequence[int], ranks: int) -> list[Packs]:
    """Assign packs to data-parallel ranks: the same number for each rank, balanced by tokens.

    The largest pack goes first, each to the rank with the fewest tokens that has a free place. Every rank has
    ⌈packs / ranks⌉ places (at least one); empty ones get filler packs, so that all ranks run the same number of
    micro-batches.
    ``pack_tokens`` is aligned with ``packs``. Returns one list of packs for each rank.
    """
    places = max(1, -(-len(packs) // ranks))
    hands: list[Packs] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for number in sorted(range(len(packs)), key=lambda number: (-pack_tokens[number], number)):
        rank = min((r for r in range(ranks) if len(hands[r]) < places), key=lambda r: (load[r], r))
        hands[rank].append(packs[number])
        load[rank] += pack_tokens[number]
    return [hand + [[] for _ in range(places - len(hand))] for hand in hands]
