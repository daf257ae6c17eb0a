"""The pairs of global batch k of epoch e, which depend only on (pairs, seed, epoch).

They do not depend on world size, packing, micro-batches or restarts, so a resumed or rescaled run sees the same
batches. They must not depend on library versions either: numpy guarantees that a bit generator's raw stream never
changes (NEP 19), but not ``Generator.permutation``. A permutation here is therefore the stable argsort of Philox's raw
64-bit words.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from dpo_api.plan import batches_per_epoch

PairIds = NDArray[np.int64]
"""[n] int64, positions in the PairIndex."""


def epoch_order(pairs: int, seed: int, epoch: int) -> PairIds:
    """Return a permutation of range(pairs) for this epoch (0-based). It depends only on the three arguments."""
    digest = hashlib.sha256(f"dpo-operator pair order 1\n{seed}\n{epoch}".encode()).digest()
    # Philox 4x64 takes a 128-bit key; passing it directly bypasses numpy's own seed hashing.
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(pairs)
    # Equal words (about pairs²/2⁶⁵) are ordered by position, since the sort is stable.
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def batch_pairs(pairs: int, global_batch_size: int, seed: int, epoch: int, *, drop_last: bool) -> list[PairIds]:
    """Return the epoch's global batches in order; each is a [≤ global_batch_size] view of one permutation.

    With ``drop_last`` the remaining pairs at the end are not used in this epoch; the next epoch leaves out others.
    """
    order = epoch_order(pairs, seed, epoch)
    count = batches_per_epoch(pairs, global_batch_size, drop_last=drop_last)
    return [order[k * global_batch_size : (k + 1) * global_batch_size] for k in range(count)]


def validation_batches(pairs: int, global_batch_size: int) -> list[PairIds]:
    """Return the batches of the whole set in file order; the last may be smaller, and nothing is dropped."""
    order = np.arange(pairs, dtype=np.int64)
    return [order[start : start + global_batch_size] for start in range(0, pairs, global_batch_size)]
