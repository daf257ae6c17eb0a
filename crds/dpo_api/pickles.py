"""An unpickler that knows only the globals of a list, for pickles that somebody else may have written.

Unpickling a class or a function imports it and may call it, so an unrestricted unpickler runs whatever a crafted pickle
says. Each list is at its reader: `dpo_trainer.checkpoint.pickles` for our checkpoints, `dpo_trainer.peers` for messages
between processes, `dpo_api.models.megatron.torchfiles` for models.
"""

import pickle
from collections.abc import Mapping
from typing import ClassVar

Globals = frozenset[tuple[str, str]]
"""(module, name) of classes and functions. Each must be harmless with any arguments."""


class AllowListUnpickler(pickle.Unpickler):
    """Raises UnpicklingError for a pickle that names anything outside ``allowed``."""

    allowed: ClassVar[Globals] = frozenset()
    replaced: ClassVar[Mapping[tuple[str, str], object]] = {}
    """(module, name) → what is used in its place; it need not exist."""

    def find_class(self, module: str, name: str) -> object:
        """Return the class or function. Nothing is imported for one that is not in the list."""
        if (module, name) in self.replaced:
            return self.replaced[module, name]
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
