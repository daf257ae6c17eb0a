"""Opens the stores that a spec's sections describe."""

from __future__ import annotations

from dpo_api.spec import DPOJobSpec, StorageAccess
from dpo_store import RetryPolicy, StorageOptions, Store, open_store
from dpo_store.access import options_of

PATIENCE = RetryPolicy(attempts=4, base=0.3, cap=3.0, connect_timeout=5.0, read_timeout=20.0)
"""A user is waiting: give up after about half a minute, where a run would retry for minutes."""


class Stores:
    """One store for each set of S3 access settings in a spec."""

    def __init__(self, spec: DPOJobSpec) -> None:
        self._spec = spec
        self._open: dict[StorageOptions, Store] = {}

    def reach(self, access: StorageAccess | None = None) -> Store:
        """Return the store for a source or output with this `storage` section, completed by `spec.storage`."""
        options = options_of(self._spec.storage, access)
        if options not in self._open:
            self._open[options] = open_store(options, retry=PATIENCE)
        return self._open[options]
