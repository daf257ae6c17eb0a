"""Reference log-probs: computed once with the frozen start model and cached.

Each pair has two sums (chosen, rejected) in float64. They are stored as safetensors under a key made of everything that
changes them, so later epochs, restarts and sweeps over losses and learning rates reuse them. NaN means not computed: a
short run computes only what it needs, and a longer one adds the rest.
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
    """Return the key of one data set's sums: 32 hexadecimal digits.

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
        """Return a table of ``pairs`` rows in which nothing is computed."""
        return cls(torch.full((pairs, 2), float("nan"), dtype=torch.float64))

    def missing(self, needed: Pairs) -> Pairs:
        """Return the needed pairs that are not computed yet, in ascending order."""
        wanted = np.unique(needed)
        known: NDArray[np.bool_] = torch.isfinite(self.sums[torch.from_numpy(wanted)]).all(dim=1).numpy()
        return wanted[~known]

    def of(self, pairs: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return these pairs' [P, 2] float64 sums, zeros for a filler (-1). Raises InternalError if one is missing."""
        index = torch.as_tensor(pairs, dtype=torch.int64)
        found = torch.where((index >= 0).unsqueeze(1), self.sums[index.clamp(min=0)], 0.0)
        if not bool(torch.isfinite(found).all()):
            bad = index[~torch.isfinite(found).all(dim=1)]
            raise InternalError(f"pair {int(bad[0])} is missing from the table of reference log-probs")
        return found


class ReferenceCache:
    """Tables in a folder or under an S3 prefix. A damaged file counts as absent and is computed again."""

    def __init__(self, store: Store, uri: str) -> None:
        self._store = store
        self._uri = uri.rstrip("/")

    def location(self, key: str) -> str:
        """Return the address of this key's table."""
        return f"{self._uri}/{key}.safetensors"

    def read(self, key: str, pairs: int) -> ReferenceTable:
        """Return the stored table, or an empty one."""
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
    """Compute the missing pairs of ``needed``, ``step`` at a time; calls ``after_step(done, of)`` after each.

    Raises NonFiniteError if the model gives NaN or infinity for a pair.
    """
    missing = table.missing(needed)
    for start in range(0, len(missing), step):
        pairs = missing[start : start + step]
        sums = compute(pairs)
        if not bool(torch.isfinite(sums).all()):
            bad = int(pairs[int((~torch.isfinite(sums).all(dim=1)).nonzero()[0])])
            raise NonFiniteError(f"the start model's log-prob of pair {bad} (counted from 0) is NaN or infinite")
        table.sums[torch.from_numpy(pairs)] = sums
        after_step(start + len(pairs), len(missing))
