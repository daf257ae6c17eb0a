"""The pairs of global batch k of epoch e, which depend only on (pairs, seed, epoch), and with weights on the sources.

They do not depend on world size, packing, micro-batches or restarts, so a resumed or rescaled run sees the same
batches. They must not depend on library versions either: numpy guarantees that a bit generator's raw stream never
changes (NEP 19), but not ``Generator.permutation``. A permutation here is therefore the stable argsort of Philox's raw
64-bit words.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_api.plan import batches_per_epoch

PairIds = NDArray[np.int64]
"""[n] int64, positions in the PairIndex."""


@dataclass(frozen=True)
class Blend:
    """How many of each source's pairs an epoch uses. The sources follow each other in the PairIndex.

    pairs: usable pairs of each source, [sources]; uses: pairs of it in an epoch (see ``dpo_api.blend``), [sources].
    """

    pairs: tuple[int, ...]
    uses: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """Whether an epoch uses each pair once."""
        return self.pairs == self.uses

    def __str__(self) -> str:
        return ", ".join(f"{uses} of {pairs}" for uses, pairs in zip(self.uses, self.pairs, strict=True))


def _shuffled(count: int, name: str, *numbers: int) -> PairIds:
    """Return a permutation of range(count) that depends only on the arguments."""
    digest = hashlib.sha256("\n".join([f"dpo-operator {name} order 1", *map(str, numbers)]).encode()).digest()
    # Philox 4x64 takes a 128-bit key; passing it directly bypasses numpy's own seed hashing.
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    # Equal words (about count²/2⁶⁵) are ordered by position, since the sort is stable.
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def epoch_order(pairs: int, seed: int, epoch: int) -> PairIds:
    """Return a permutation of range(pairs) for this epoch (0-based). It depends only on the three arguments."""
    return _shuffled(pairs, "pair", seed, epoch)


def epoch_pairs(blend: Blend, seed: int, epoch: int) -> PairIds:
    """Return the pairs that an epoch (0-based) uses, ascending, a pair as often as it is used.

    A source is gone through again and again, each time in another order, and an epoch takes the next ``uses`` of its
    pairs: no pair is used again before every other pair of its source. A pass that is all in one epoch needs no order.
    """
    found: list[PairIds] = []
    first = 0
    for number, (pairs, uses) in enumerate(zip(blend.pairs, blend.uses, strict=True)):
        start, stop = epoch * uses, (epoch + 1) * uses
        for turn in range(start // pairs, -(-stop // pairs)) if pairs else ():
            low, high = max(start - turn * pairs, 0), min(stop - turn * pairs, pairs)
            whole = high - low == pairs
            ids = np.arange(pairs) if whole else _shuffled(pairs, "source", seed, number, turn)[low:high]
            found.append(first + ids)
        first += pairs
    return np.sort(np.concatenate([*found, np.zeros(0, np.int64)]))


def batch_pairs(
    pairs: int, global_batch_size: int, seed: int, epoch: int, *, drop_last: bool, blend: Blend | None = None
) -> list[PairIds]:
    """Return the epoch's global batches in order; each is a [≤ global_batch_size] view of one permutation.

    With ``drop_last`` the remaining pairs at the end are not used in this epoch; the next epoch leaves out others.
    ``blend``: uses pairs as often as it says, ``pairs`` uses in all. None: each pair once, as with equal weights.
    """
    order = epoch_order(pairs, seed, epoch)
    if blend is not None and not blend.is_even:
        order = epoch_pairs(blend, seed, epoch)[order]
    count = batches_per_epoch(pairs, global_batch_size, drop_last=drop_last)
    return [order[k * global_batch_size : (k + 1) * global_batch_size] for k in range(count)]


def validation_batches(pairs: int, global_batch_size: int) -> list[PairIds]:
    """Return the batches of the whole set in file order; the last may be smaller, and nothing is dropped."""
    order = np.arange(pairs, dtype=np.int64)
    return [order[start : start + global_batch_size] for start in range(0, pairs, global_batch_size)]
