"""Shifts the wall clock of this process by the seconds that a file holds. See the package's own text."""

from __future__ import annotations

import os
import time


def _play(file: str) -> None:
    wall, wall_ns = time.time, time.time_ns

    def shift() -> float:
        with open(file, encoding="ascii") as text:  # noqa: PTH123 - as little as may be is imported this early
            return float(text.read())

    time.time = lambda: wall() + shift()
    time.time_ns = lambda: wall_ns() + int(shift() * 1e9)


if "DPO_PLAYED_CLOCK" in os.environ:
    _play(os.environ["DPO_PLAYED_CLOCK"])
