"""Pairs of one global batch → packs under a token budget → the packs of each rank.

Deterministic arithmetic on the pairs' costs, so that every tensor- and pipeline-parallel rank builds the same packs.
The result changes only which tokens share a stream, never the sums of the step.
"""

from collections.abc import Sequence

import numpy as np

Packs = list[list[int]]
"""Each pack lists positions in the global batch. An empty list is a filler pack (zero weight)."""


def pair_cost(prompt: int, chosen: int, rejected: int, *, share: bool) -> int:
    """Tokens of a pair in a stream: its prompt once when shared, else before each response (one when rejected is 0)."""
    copies = 1 if share or rejected == 0 else 2
    return copies * prompt + chosen + rejected


def _first_fit(
    costs: Sequence[int], order: Sequence[int], max_tokens: int, max_pairs: int | None, bins: int = 0
) -> Packs:
    """First-fit of ``order`` into packs; with ``bins``, into that many from the start, the least loaded first."""
    packs: Packs = [[] for _ in range(bins)]
    room = np.full(len(order) + bins, -1, dtype=np.int64)  # [packs that can ever exist]; -1: closed or not yet there
    room[:bins] = max_tokens
    for position in order:
        cost = costs[position]
        target = int(np.argmax(room) if bins else np.argmax(room >= cost))
        if room[target] < cost:  # fits nowhere: a pack of its own, even when the pair alone exceeds the budget
            target = len(packs)
            packs.append([])
            room[target] = max_tokens
        packs[target].append(position)
        full = max_pairs is not None and len(packs[target]) >= max_pairs
        room[target] = -1 if full else max(int(room[target]) - cost, 0)
    return packs


def pack_batch(costs: Sequence[int], max_tokens: int, max_pairs: int | None, *, ranks: int = 1) -> Packs:
    """Group a global batch's pairs into packs of at most ``max_tokens`` tokens and ``max_pairs`` pairs.

    First-fit-decreasing by ``costs`` [n] (tokens, see ``pair_cost``), ties in batch order. When the number of packs
    does not divide by ``ranks`` the pairs are spread evenly over the next multiple instead (as far as there are
    pairs), so that no rank idles while another holds a fuller pack. A pair that alone exceeds the budget is a pack of
    its own.
    """
    if not costs:
        return []
    order = sorted(range(len(costs)), key=lambda position: (-costs[position], position))
    packs = _first_fit(costs, order, max_tokens, max_pairs)
    wanted = min(-(-len(packs) // ranks) * ranks, len(costs))
    if wanted > len(packs):
        even = _first_fit(costs, order, max_tokens, max_pairs, bins=wanted)
        if len(even) == wanted:  # spreading can fail where first-fit succeeded; its packs then stand
            packs = even
    return [sorted(pack) for pack in packs]


def deal(packs: Packs, pack_tokens: Sequence[int], ranks: int) -> list[Packs]:
    """Deal packs to data-parallel ranks: equal numbers of packs a rank, balanced by tokens.

    Heaviest first, each to the rank with the fewest tokens that still has a place; ⌈packs / ranks⌉ places each (at
    least one), the empty ones filled with filler packs, so that all ranks run the same number of micro-batches.
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
