"""JSON as Go writes it, for what an API server does to a manifest between our writing and our reading."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any


def go_number(value: float) -> str:
    """Write a float64 as encoding/json does: 1.0 is 1, 9e-07 is 9e-7, 1e21 begins the exponents.

    Source: floatEncoder in https://go.dev/src/encoding/json/encode.go.
    """
    if not math.isfinite(value):
        raise ValueError(f"{value} has no JSON form")
    # repr has the shortest digits that read back, as Go's; only their layout differs.
    decimal = Decimal(repr(float(value)))
    if value != 0 and not 1e-6 <= abs(value) < 1e21:
        mantissa, _, exponent = f"{decimal:e}".partition("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent):+d}"
    text = f"{decimal:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def go_json(value: Any) -> str:
    """Write JSON values with sorted keys and Go's numbers."""
    if isinstance(value, dict):
        inside = ",".join(f"{json.dumps(key)}:{go_json(value[key])}" for key in sorted(value))
        return "{" + inside + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(go_json(item) for item in value) + "]"
    if isinstance(value, float):
        return go_number(value)
    return json.dumps(value)
