"""A small reader of structural schemas: what the API server's types and bounds refuse, without its CEL rules.

Written from the OpenAPI v3 rules that Kubernetes documents, apart from the generator that it tests.
"""

from __future__ import annotations

import re
from typing import Any

Schema = dict[str, Any]


def problems(schema: Schema, value: Any, path: str = "") -> list[str]:
    """Return what is wrong with a value, one text a problem."""
    if schema.get("x-kubernetes-int-or-string"):
        if not (_has_type(value, "integer") or isinstance(value, str)):
            return [f"{path}: neither integer nor string"]
    elif not _has_type(value, schema["type"]):
        return [f"{path}: not of type {schema['type']}"]
    found = [f"{path}: {text}" for text in _bounds(schema, value)]
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{path}.{name}: required" for name in schema.get("required", ()) if name not in value]
        for name, child in value.items():
            inner = properties.get(name, rest)
            if isinstance(inner, dict):
                found += problems(inner, child, f"{path}.{name}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            found += problems(schema["items"], child, f"{path}[{index}]")
    return found


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":  # Go's JSON takes 2.0 for 2
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    types: dict[str, type | tuple[type, ...]] = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "boolean": bool,
    }
    return isinstance(value, types[kind])


def _bounds(schema: Schema, value: Any) -> list[str]:
    found: list[str] = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"not one of {schema['enum']}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is not None and (value < low or (schema.get("exclusiveMinimum") and value == low)):
            found.append(f"below {low}")
        if high is not None and (value > high or (schema.get("exclusiveMaximum") and value == high)):
            found.append(f"above {high}")
    for kind, least, most in (
        (str, "minLength", "maxLength"),
        (list, "minItems", "maxItems"),
        (dict, "minProperties", "maxProperties"),
    ):
        if isinstance(value, kind):
            if len(value) < schema.get(least, 0):
                found.append(f"fewer than {schema[least]}")
            if most in schema and len(value) > schema[most]:
                found.append(f"more than {schema[most]}")
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"does not match {schema['pattern']}")
    return found


def unknown_fields(schema: Schema, value: Any, path: str = "") -> list[str]:
    """Return the paths that strict field validation names and pruning would drop."""
    found: list[str] = []
    if isinstance(value, list):
        for index, child in enumerate(value):
            found += unknown_fields(schema.get("items", {}), child, f"{path}[{index}]")
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return found
    for name, child in value.items():
        inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        where = f"{path}.{name}" if path else name
        if path == "metadata":  # every object's own schema
            continue
        if inner is None:
            found.append(where)
        else:
            found += unknown_fields(inner, child, where)
    return found
