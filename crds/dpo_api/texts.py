"""Formats numbers, counts, sizes and durations as text, in the same way in every program.

Choose by how the text is used:

- ``number``: a value that could be copied into a manifest (a learning rate, a limit); ``numbers`` for several.
- ``compact``: axes, tiles and tables with little space.
- ``figure``, ``fixed``: a value that changes on the screen; the number of digits stays the same.
- ``counted``, ``grouped``: whole numbers.
- ``size``: bytes; ``sizes`` for several.
- ``clock``, ``elapsed``, ``age``: seconds, as a countdown, as an elapsed time, as in kubectl's AGE column.
"""

from __future__ import annotations

from typing import Any

NUMBER_DIGITS = 6
"""Significant digits of ``number``: enough for every setting that people type."""

_EXACT_DIGITS = 17
"""Significant digits that distinguish any two floats."""


def number(value: float, digits: int = NUMBER_DIGITS) -> str:
    """Write a number as in a manifest: 9e-6, not 9e-06; 1, not 1.0."""
    mantissa, sign, exponent = f"{value + 0.0:.{digits}g}".partition("e")  # + 0.0: no -0
    return f"{mantissa}e{int(exponent)}" if sign else mantissa


def numbers(*values: float, digits: int = NUMBER_DIGITS) -> tuple[str, ...]:
    """Write numbers that one text compares, with enough digits that different numbers look different.

    Equal numbers get equal texts.
    """
    while True:
        texts = tuple(number(value, digits) for value in values)
        if len(set(texts)) == len(set(values)) or digits >= _EXACT_DIGITS:
            return texts
        digits += 1


def compact(value: float) -> str:
    """Write a number in about seven characters at most: 0.0712, 3.1, 12.3k, 9e-7."""
    if value == 0:
        return "0"
    size_of = abs(value)
    if size_of >= 1e15 or size_of < 1e-3:
        return number(value, 3)
    for limit, scale, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size_of >= limit:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0f}" if size_of >= 100 else f"{value:.3g}"


def figure(value: float) -> str:
    """Write a loss or a margin in three digits, trailing zeros included: 0.693, 3.10, 12.3, 12,345, 3e-5."""
    size_of = abs(value)
    if size_of >= 1000:
        return f"{value:,.0f}"
    if size_of >= 10:
        return f"{value:.1f}"
    if size_of >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}" if size_of >= 0.001 or value == 0 else number(value, 2)


def fixed(value: float, decimals: int, width: int = 16) -> str:
    """Write a number with a fixed number of decimals, or in three digits if that is wider than ``width``."""
    text = f"{value:.{decimals}f}"
    return text if len(text) <= width else f"{value:.3g}"[:width]


def percent(share: float) -> str:
    """Write a share from 0 to 1: 97.5%."""
    return f"{share:.1%}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun: 1 error, 2 errors, 12,000 pairs."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def grouped(value: Any) -> str:
    """Write a whole number with thousands separators, and any other number as ``number`` does."""
    return f"{int(value):,}" if float(value).is_integer() else number(value)


def size(count: float) -> str:
    """Write a number of bytes in the units of Kubernetes' quantities: 512 B, 1.2 MiB, 16.1 GiB."""
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    unit = 0
    while value >= 1023.95 and unit < len(units) - 1:  # what would be rounded to 1024.0
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {units[unit]}"


_SCALES = {"m": 1e-3, "": 1, **{unit: 1000.0**n for n, unit in enumerate("kMGTPE", 1)}}
_SCALES |= {f"{unit}i": 1024.0**n for n, unit in enumerate("KMGTPE", 1)}


def quantity(text: str) -> float:
    """Return the value of a Kubernetes quantity: 256Gi is 274877906944, 500m is 0.5."""
    digits = text.rstrip("mkKMGTPEi")
    return float(digits) * _SCALES[text[len(digits) :]]


def sizes(*counts: float) -> tuple[str, ...]:
    """Write sizes that one text compares, in bytes if two different sizes would look the same."""
    texts = tuple(size(count) for count in counts)
    return texts if len(set(texts)) == len(set(counts)) else tuple(f"{count:,.0f} B" for count in counts)


def clock(seconds: float) -> str:
    """Write a remaining time: 0:09, 12:30, 3:07:00."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def elapsed(seconds: float) -> str:
    """Write an elapsed time: 0.4 s, 41 s, 2:05 min, 3:07:00 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    return f"{clock(seconds)} {'min' if seconds < 3599.5 else 'h'}"


def age(seconds: float) -> str:
    """Write a duration as kubectl does: 45s, 12m, 3h12m, 5d4h."""
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m" if minutes else f"{whole}s"
