"""The single rules of a structural schema: where they are, which of them a document breaks, and the schema without
some of them. A test of a rule proves something only if the rule's removal lets the document through.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]
Path = tuple[str, ...]
"""Names of properties; ``[]`` stands for the items of a list, ``*`` for the values of a map."""

LIMITS = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "enum")
_OPEN: Schema = {"x-kubernetes-preserve-unknown-fields": True}


@dataclass(frozen=True)
class SchemaRule:
    """One thing that a schema asks of one place."""

    path: Path
    what: str
    """A keyword of ``LIMITS``; ``type``; ``required:NAME``; ``closed`` (no unknown fields); ``cel:MESSAGE``,
    with the field that it blames inside its place, ``cel.FIELD:MESSAGE``."""

    def __str__(self) -> str:
        """Write it as one line, such as ``spec.dpo.beta minimum``."""
        return f"{'.'.join(self.path).replace('.[]', '[]')} {self.what}"


def node(schema: Schema, path: Path) -> Schema:
    """Return the part of a schema at a path."""
    for step in path:
        key = {"[]": "items", "*": "additionalProperties"}.get(step)
        schema = schema[key] if key else schema["properties"][step]
    return schema


def rules(schema: Schema, path: Path = ()) -> Iterator[SchemaRule]:
    """Yield every rule of a schema."""
    yield SchemaRule(path, "type")
    for keyword in LIMITS:
        if keyword in schema:
            yield SchemaRule(path, keyword)
    yield from (SchemaRule(path, f"required:{name}") for name in schema.get("required", ()))
    yield from (cel_rule(path, cel) for cel in schema.get("x-kubernetes-validations", ()))
    if "properties" in schema:
        yield SchemaRule(path, "closed")
    for step, child in _children(schema):
        yield from rules(child, (*path, step))


def cel_rule(path: Path, cel: Schema) -> SchemaRule:
    """Return the name of a CEL rule at a place."""
    return SchemaRule(path, f"cel{cel.get('fieldPath', '')}:{cel['message']}")


def _children(schema: Schema) -> Iterator[tuple[str, Schema]]:
    yield from schema.get("properties", {}).items()
    if "items" in schema:
        yield "[]", schema["items"]
    if isinstance(schema.get("additionalProperties"), dict):
        yield "*", schema["additionalProperties"]


def broken(schema: Schema, value: Any, path: Path = ()) -> Iterator[SchemaRule]:
    """Yield the rules, other than CEL, that a value breaks: OpenAPI v3 as Kubernetes documents it."""
    if "type" not in schema and "x-kubernetes-int-or-string" not in schema:
        return
    if not _typed(schema, value):
        yield SchemaRule(path, "type")
        return
    yield from (
        SchemaRule(path, keyword) for keyword in LIMITS if keyword in schema and not _within(schema, keyword, value)
    )
    if isinstance(value, dict):
        yield from (SchemaRule(path, f"required:{n}") for n in schema.get("required", ()) if value.get(n) is None)
        known = schema.get("properties", {})
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield from (SchemaRule(path, "closed") for name in value if name not in known)
        for name, child in value.items():
            step = name if name in known else "*"
            inner = known.get(name, schema.get("additionalProperties"))
            if isinstance(inner, dict) and child is not None:
                yield from broken(inner, child, (*path, step))
    elif isinstance(value, list):
        for child in value:
            yield from broken(schema["items"], child, (*path, "[]"))


def _typed(schema: Schema, value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool):
        return schema.get("type") == "boolean"
    if schema.get("x-kubernetes-int-or-string"):
        return whole or isinstance(value, str)
    match schema["type"]:
        case "integer":
            return whole
        case "number":
            return isinstance(value, int | float)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case _:
            return isinstance(value, dict)


def _within(schema: Schema, keyword: str, value: Any) -> bool:
    limit = schema[keyword]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if keyword == "enum":
        return value in limit
    if keyword == "minimum":
        return not number or value > limit or (value == limit and not schema.get("exclusiveMinimum"))
    if keyword == "maximum":
        return not number or value < limit or (value == limit and not schema.get("exclusiveMaximum"))
    kind: Any = {"Length": str, "Items": list, "Properties": dict}[keyword[3:]]
    if not isinstance(value, kind):
        return True
    return bool(len(value) >= limit if keyword.startswith("min") else len(value) <= limit)


def _readers(schema: Schema, path: Path) -> Iterator[tuple[Path, Schema]]:
    """Yield the CEL rules around a place that read it, each with its own place."""
    for length in range(len(path)):
        above = path[:length]
        for cel in node(schema, above).get("x-kubernetes-validations", ()):
            if _mentions(cel["rule"], path[length:]):
                yield above, cel


def _mentions(cel: str, steps: Path) -> bool:
    names = steps[: steps.index("[]")] if "[]" in steps else steps
    return bool(names) and re.search(r"\b(self|oldSelf)\." + r"\.".join(names) + r"\b", cel) is not None


def without(schema: Schema, removed: Collection[SchemaRule]) -> Schema:
    """Return a copy of a schema that lacks some rules. Limits of size are raised by one: CEL's cost needs them."""
    schema = copy.deepcopy(schema)
    # From the leaves up, so that a place still exists when its own rules go.
    for rule in sorted(set(removed), key=lambda rule: (rule.what == "type", -len(rule.path))):
        place = node(schema, rule.path)
        if rule.what == "type":
            for above, cel in list(_readers(schema, rule.path)):
                node(schema, above)["x-kubernetes-validations"].remove(cel)
            place.clear()
            place.update(_OPEN)
        elif rule.what == "closed":
            place.update(_OPEN)
        elif rule.what.startswith("required:"):
            place["required"].remove(rule.what.partition(":")[2])
        elif rule.what.startswith("cel"):
            kept = [cel for cel in place["x-kubernetes-validations"] if cel_rule(rule.path, cel) != rule]
            place["x-kubernetes-validations"] = kept
        elif rule.what.startswith("max") and rule.what != "maximum":
            place[rule.what] += 1
        else:
            del place[rule.what]
            if rule.what == "enum":
                place["maxLength"] = 20
            place.pop({"minimum": "exclusiveMinimum", "maximum": "exclusiveMaximum"}.get(rule.what, ""), None)
    return schema
