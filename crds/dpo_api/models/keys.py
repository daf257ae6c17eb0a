"""Typed access to the keys of a config.json; each error names the file, the key, its value and the fix."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dpo_api.errors import InvalidModelError

SHOWN = 200
"""Characters of a value that an error shows."""


class Keys:
    """The keys of one parsed config.json.

    ``where`` is the file's address, for errors. ``defaults`` are the values that transformers' own configuration class
    takes for absent keys.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        *,
        file: str = "config.json",
    ) -> None:
        self.raw = raw
        self.where = where
        self.defaults = defaults or {}
        self.original = f"copy the model's original {file}"

    def error(self, key: str, value: object, why: str) -> InvalidModelError:
        """Return the error that refuses a key's value."""
        shown = json.dumps(value, default=str, ensure_ascii=False)
        if len(shown) > SHOWN:
            shown = f"{shown[:SHOWN]}…"
        return InvalidModelError(f"{self.where}: {key} is {shown}: {why}")

    def missing(self, key: str) -> InvalidModelError:
        """Return the error for a key that has no value and no default."""
        return InvalidModelError(f"{self.where}: {key} is missing; {self.original}")

    def get(self, key: str) -> Any:
        """Return a key's value, or its default if the key is absent. A null stays None, as in transformers."""
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer. ``default`` replaces null and absent keys that have no default of their own."""
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.missing(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, value, f"it must be a positive integer; {self.original}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive, finite number."""
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.missing(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(key, value, f"it must be a positive number; {self.original}")
        return float(value)
