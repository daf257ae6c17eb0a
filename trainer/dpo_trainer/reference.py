"""Reference log-probabilities as data: computed once by the frozen start model, kept under a key, complete or refused.

For each pair two sums (chosen, rejected) in float64. Stored as safetensors under a key of everything that changes them,
so later epochs, restarts and sweeps over losses and learning rates reuse them. NaN means not computed: a limited run
computes what it needs, a longer one adds to it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from dpo_api.errors import InternalError, NonFiniteError, NotFoundError
from dpo_store import Store

Pairs = NDArray[np.int64]
"""[n] int64 dataset indices."""

Compute = Callable[[Pairs], torch.Tensor]
"""Pairs [n] -> their reference sums [n, 2] float64, equal on all ranks; a collective."""


def reference_key(*, model: str, data: str, precision: str, form: str) -> str:
    """The key of one data set's sums: hex, 32 digits.

    ``model``: fingerprint of the start model's weights and config. ``data``: fingerprint of token ids and response
    bounds of every pair. ``form``: anything else in the forward pass that changes numbers (attention, linear layers).
    """
    parts = json.dumps(
        {"format": 1, "model": model, "data": data, "precision": precision, "form": form}, sort_keys=True
    )
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


@dataclass
class ReferenceTable:
    """The reference sums of one data set."""

    sums: torch.Tensor  #: [n, 2] float64; NaN where not computed

    @classmethod
    def empty(cls, pairs: int) -> "ReferenceTable":
        """A table that knows nothing."""
        return cls(torch.full((pairs, 2), float("nan"), dtype=torch.float64))

    def missing(self, needed: Pairs) -> Pairs:
        """Those of the needed pairs that are not computed yet, in ascending order."""
        wanted = np.unique(needed)
        known: NDArray[np.bool_] = torch.isfinite(self.sums[torch.from_numpy(wanted)]).all(dim=1).numpy()
        return wanted[~known]

    def of(self, pairs: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """[P, 2] float64 sums of these pairs; a filler (-1) gets zeros. InternalError where one is missing."""
        index = torch.as_tensor(pairs, dtype=torch.int64)
        found = torch.where((index >= 0).unsqueeze(1), self.sums[index.clamp(min=0)], 0.0)
        if not bool(torch.isfinite(found).all()):
            bad = index[~torch.isfinite(found).all(dim=1)]
            raise InternalError(f"the reference lacks pair {int(bad[0])}: its table is incomplete")
        return found


class ReferenceCache:
    """Tables in a folder or an S3 prefix. A damaged file counts as absent: it can always be computed again."""

    def __init__(self, store: Store, uri: str) -> None:
        self._store = store
        self._uri = uri.rstrip("/")

    def location(self, key: str) -> str:
        """Where the table of this key lies."""
        return f"{self._uri}/{key}.safetensors"

    def read(self, key: str, pairs: int) -> ReferenceTable:
        """The stored table, or an empty one."""
        try:
            tensors = load(self._store.read(self.location(key)))
        except (NotFoundError, SafetensorError):
            return ReferenceTable.empty(pairs)
        sums = tensors.get("sums")
        if sums is None or sums.shape != (pairs, 2) or sums.dtype != torch.float64:
            return ReferenceTable.empty(pairs)
        return ReferenceTable(sums)

    def write(self, key: str, table: ReferenceTable) -> None:
        """Store the table; atomic in a folder, one object in S3."""
        self._store.write(self.location(key), save({"sums": table.sums.contiguous()}))


def complete(
    table: ReferenceTable, needed: Pairs, compute: Compute, *, step: int, after_step: Callable[[int, int], None]
) -> None:
    """Compute what is missing of ``needed``, ``step`` pairs at a time; calls ``after_step(done, of)`` after each.

    Raises NonFiniteError when the model gives no finite number for a pair.
    """
    missing = table.missing(needed)
    for start in range(0, len(missing), step):
        pairs = missing[start : start + step]
        sums = compute(pairs)
        if not bool(torch.isfinite(sums).all()):
            bad = int(pairs[int((~torch.isfinite(sums).all(dim=1)).nonzero()[0])])
            raise NonFiniteError(f"the start model gives no finite log-probability for pair {bad} (counted from 0)")
        table.sums[torch.from_numpy(pairs)] = sums
        after_step(start + len(pairs), len(missing))
