"""Looks up keys of a row: plain ones, and paths into nested values such as ``a.b[0]``."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dpo_trainer.data.problems import kind_of

Steps = tuple[str | int | None, ...]
"""A field's name, an element's position, or None: each element."""

_PART = re.compile(r"([^.\[\]]+)((?:\[-?\d*\])*)")
_POSITION = re.compile(r"\[(-?\d*)\]")


@lru_cache(maxsize=256)
def steps_of(name: str) -> Steps | None:
    """Return the steps of a path: ``a.b[0].c[]`` → a, b, 0, c, each. None if the text has no two steps or more."""
    steps: list[str | int | None] = []
    for part in name.split("."):
        found = _PART.fullmatch(part)
        if found is None:
            return None
        steps.append(found[1])
        for position in _POSITION.findall(found[2]):
            if position == "-":
                return None
            steps.append(int(position) if position else None)
    return tuple(steps) if len(steps) > 1 else None


def root_of(name: str) -> str:
    """Return the key of the row that a path begins at; of a plain key, itself."""
    steps = steps_of(name)
    return name if steps is None else str(steps[0])


def value_at(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a key, or of a path if no key has this name; None if it is absent."""
    if name in row:
        return row[name]
    steps = steps_of(name)
    return None if steps is None else _walk(row, steps)


def _walk(value: Any, steps: Steps) -> Any:
    for number, step in enumerate(steps):
        if step is None:
            rest = steps[number + 1 :]
            return [_walk(element, rest) for element in value] if isinstance(value, list) else None
        value = _step(value, step)
    return value


def _step(value: Any, step: str | int) -> Any:
    if isinstance(step, str):
        return value.get(step) if isinstance(value, Mapping) else None
    return value[step] if isinstance(value, list) and -len(value) <= step < len(value) else None


def why_absent(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Say what is there in place of these keys: ``keys here: "a", "b"``, or where a path ends."""
    steps = steps_of(names[0]) if len(names) == 1 else None
    if steps is None or row.get(str(steps[0])) is None:
        return f"keys here: {_names(row)}"
    value: Any = row
    text = ""
    for step in steps:
        if step is None:
            return f'"{text}" is {kind_of(value)}, not a list'
        inner = _step(value, step)
        if inner is None:
            if isinstance(value, list):
                return f'"{text}" has {len(value)} elements'
            keys = f", with the keys {_names(value)}" if isinstance(value, Mapping) else ""
            return f'"{text}" is {kind_of(value)}{keys}'
        value = inner
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return f'"{text}" is null'


def _names(value: Mapping[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in list(value)[:8]) or "none"
