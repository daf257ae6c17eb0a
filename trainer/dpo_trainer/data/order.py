"""Which pairs make up global batch k of epoch e: arithmetic on (pairs, seed, epoch), nothing else.

World size, packing, micro-batches and restarts do not enter, so a resumed or rescaled run sees the same batches. The
order must also outlive library versions: numpy promises that a bit generator's raw stream never changes (NEP 19) but
says no such thing of ``Generator.permutation``, so a permutation here is the stable argsort of Philox's raw 64-bit
words.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from dpo_api.plan import batches_per_epoch

PairIds = NDArray[np.int64]
"""[n] int64, positions in the PairIndex."""


def epoch_order(pairs: int, seed: int, epoch: int) -> PairIds:
    """A permutation of range(pairs) for this epoch (0-based). It depends on the three arguments alone."""
    digest = hashlib.sha256(f"dpo-operator pair order 1\n{seed}\n{epoch}".encode()).digest()
    # Philox 4x64 takes a 128-bit key; given as such it bypasses numpy's own seed hashing.
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(pairs)
    # Equal words (about pairs²/2⁶⁵) are ordered by position, since the sort is stable.
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def batch_pairs(pairs: int, global_batch_size: int, seed: int, epoch: int, *, drop_last: bool) -> list[PairIds]:
    """The epoch's global batches in order; each is a [≤ global_batch_size] view of one permutation.

    With ``drop_last`` the pairs left over at the end sit out this epoch; the next epoch's permutation leaves out
    others.
    """
    order = epoch_order(pairs, seed, epoch)
    count = batches_per_epoch(pairs, global_batch_size, drop_last=drop_last)
    return [order[k * global_batch_size : (k + 1) * global_batch_size] for k in range(count)]


def validation_batches(pairs: int, global_batch_size: int) -> list[PairIds]:
    """The whole set in file order; the last batch may be smaller and nothing is dropped."""
    order = np.arange(pairs, dtype=np.int64)
    return [order[start : start + global_batch_size] for start in range(0, pairs, global_batch_size)]
