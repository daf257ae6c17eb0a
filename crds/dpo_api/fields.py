"""The scalar types and the base class that every section of the spec uses.

Numbers are strict but survive Go's JSON: 1.0 arrives from an API server as 1, and 2 may be written 2.0. Text is never
converted: "5" is not a number and "yes" is not a boolean. ``null`` means "not set", as it does to the API server.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

URI_PATTERN = (
    r"^(s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/.*)?"
    r"|pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(/.*)?"
    r"|file:///.*|[^:/]+(/.*)?|/.*)$"
)
"""s3://bucket/key, pvc://claim/path, file:///path or a path; any other scheme does not match."""

INPUT_PATTERN = (
    URI_PATTERN.removesuffix(")$")
    + r"|hf://(datasets/)?[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*(@[A-Za-z0-9][A-Za-z0-9_.-]*)?(/.*)?)$"
)
"""The same, or a repository of the Hugging Face Hub, which can only be read."""

REPOSITORY_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?/[A-Za-z0-9]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?$"
"""org/name of a repository on the hub."""
BRANCH_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"

NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_SUBDOMAIN_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
LABEL_KEY_PATTERN = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
PERCENT_PATTERN = r"^(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?)%$"

ENDPOINT_PATTERN = r"^https?://[^\s/@]+(/[^\s@]*)?$"
HTTP_URL_PATTERN = r"^https?://[^\s@]+$"
IMAGE_PATTERN = r"^[^\s]+$"
SOURCE_NAME_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$"
DATA_KEY_PATTERN = r"^[-._a-zA-Z0-9]+$"
MOUNT_PATH_PATTERN = r"^/[^:]*$"
ENV_NAME_PATTERN = r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"

PATTERN_HINTS = {
    URI_PATTERN: "write s3://bucket/key, pvc://claim/path or a path",
    INPUT_PATTERN: "write s3://bucket/key, pvc://claim/path, hf://org/name@revision or a path",
    REPOSITORY_PATTERN: "write org/name, each of up to 96 letters, digits, -, _ and ., not ending with - or .",
    BRANCH_PATTERN: "write a branch's name, of letters, digits, -, _ and .",
    PERCENT_PATTERN: "write a whole number without quotes, or a percentage from above 0% to 100%",
    QUANTITY_PATTERN: "write a quantity such as 500m, 32 or 256Gi",
    DNS_SUBDOMAIN_PATTERN: "use lower-case letters, digits, - and ., starting and ending with a letter or digit",
    NAME_PATTERN: "use lower-case letters, digits and -, starting with a letter and not ending with -",
    DNS_LABEL_PATTERN: "use lower-case letters, digits and -, starting and ending with a letter or digit",
    LABEL_KEY_PATTERN: "write a label key such as example.com/name",
    LABEL_VALUE_PATTERN: "use letters, digits, -, _ and ., starting and ending with a letter or digit",
    ENDPOINT_PATTERN: "write a URL without a user name, such as https://s3.example.com",
    HTTP_URL_PATTERN: "write a URL without a user name, such as https://host.example.com",
    IMAGE_PATTERN: "an image name has no spaces",
    SOURCE_NAME_PATTERN: "use letters, digits, -, _ and ., starting and ending with a letter or digit",
    DATA_KEY_PATTERN: "use letters, digits, -, _ and .",
    MOUNT_PATH_PATTERN: "write an absolute path without a colon",
    ENV_NAME_PATTERN: "use letters, digits, -, _ and ., not starting with a digit",
}
"""The hint that an error gives when a text does not match a pattern."""

SECONDS_MAX = 315_360_000  # ten years: a bound for every duration


def whole(value: Any) -> Any:
    """Convert 2.0 to 2: YAML and Go's JSON do not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _quantity(value: Any) -> Any:
    """Convert a whole number to text: a Kubernetes quantity may be either."""
    value = whole(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _count_or_percent(value: Any) -> Any:
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PydanticCustomError(
            "count_or_percent", "Input should be a whole number or a percentage; write 10% instead of 0.1"
        )
    if isinstance(value, int) and value < 1:
        raise PydanticCustomError("count_or_percent", "Input should be at least 1, or a percentage such as 10%")
    if isinstance(value, str) and not re.fullmatch(PERCENT_PATTERN, value):
        raise PydanticCustomError(
            "count_or_percent", "Input should be a percentage up to 100%, or a number without quotes"
        )
    if isinstance(value, str) and value.strip("0.%") == "":
        raise PydanticCustomError("count_or_percent", "Input should be above 0%")
    return value


Bool = Annotated[bool, Strict()]
Int = Annotated[int, BeforeValidator(whole), Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Text = Annotated[str, Strict()]
Uri = Annotated[str, StringConstraints(strict=True, pattern=URI_PATTERN, min_length=1, max_length=1024)]
InputUri = Annotated[str, StringConstraints(strict=True, pattern=INPUT_PATTERN, min_length=1, max_length=1024)]
DnsName = Annotated[str, StringConstraints(strict=True, pattern=DNS_SUBDOMAIN_PATTERN, min_length=1, max_length=253)]
DnsLabel = Annotated[str, StringConstraints(strict=True, pattern=DNS_LABEL_PATTERN, min_length=1, max_length=63)]
LabelKey = Annotated[str, StringConstraints(strict=True, pattern=LABEL_KEY_PATTERN, min_length=1, max_length=317)]
LabelValue = Annotated[str, StringConstraints(strict=True, pattern=LABEL_VALUE_PATTERN, max_length=63)]
AnnotationValue = Annotated[str, StringConstraints(strict=True, max_length=4096)]
Quantity = Annotated[
    Annotated[str, StringConstraints(strict=True, pattern=QUANTITY_PATTERN, max_length=32)],
    BeforeValidator(_quantity),
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
CountOrPercent = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[str, StringConstraints(pattern=PERCENT_PATTERN, max_length=16)],
    BeforeValidator(_count_or_percent),
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
OpenObject = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
"""An object of Kubernetes' own whose fields are not repeated here (a full pod schema would be 600 KB)."""


@dataclass(frozen=True)
class Rule:
    """What types cannot say about one section, once for the API server (CEL) and once for us."""

    field: str
    """The field to blame, in camelCase relative to the section; empty for the section itself."""
    message: str
    """One sentence: what is wrong and how to fix it."""
    cel: str
    """The rule as CEL, where ``self`` is the section."""
    holds: Callable[[Any], bool]
    """The same rule of the parsed section."""

    def to_schema(self) -> dict[str, str]:
        """Return the rule as an entry of x-kubernetes-validations."""
        path = {"fieldPath": f".{self.field}"} if self.field else {}
        return {"rule": self.cel, "message": self.message, **path}


@dataclass(frozen=True)
class Removed:
    """A field that an earlier version had."""

    field: str
    """Its name in camelCase."""
    was: Any
    """The value that changed nothing. Specs that the earlier version accepted can hold this one only."""
    answer: str
    """What an error about the field says: why it is gone and what to do."""


STORED = {"stored": True}
"""Context of validation for a spec that was accepted before: it may hold fields that were removed since."""


def _add_rules(schema: dict[str, Any], section: type[BaseModel]) -> None:
    """Add the section's rules to its JSON schema, in the form that the API server evaluates."""
    rules = section.rules if issubclass(section, Section) else ()
    if rules:
        schema["x-kubernetes-validations"] = [rule.to_schema() for rule in rules]


class Section(BaseModel):
    """A part of the spec: camelCase in JSON, frozen; unknown fields are refused and null means not set."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        json_schema_extra=_add_rules,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    removed: ClassVar[tuple[Removed, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        gone = {entry.field: entry.was for entry in cls.removed} if info.context == STORED else {}
        return {
            key: value for key, value in data.items() if value is not None and (key not in gone or value != gone[key])
        }

    @model_validator(mode="after")
    def _follow_rules(self) -> Self:
        for rule in self.rules:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message, "field": rule.field})
        return self


class SecretRef(Section):
    """A Secret in the DPOJob's namespace."""

    name: DnsName = Field(description="Name of the Secret, in the DPOJob's own namespace.")


class SecretKeyRef(Section):
    """One key of a Secret in the DPOJob's namespace."""

    name: DnsName = Field(description="Name of the Secret, in the DPOJob's own namespace.")
    key: str = Field(
        pattern=DATA_KEY_PATTERN, min_length=1, max_length=253, description="Key inside the Secret's data."
    )


class ConfigMapRef(Section):
    """A ConfigMap in the DPOJob's namespace."""

    name: DnsName = Field(description="Name of the ConfigMap, in the DPOJob's own namespace.")


def count(value: int | str, of: int) -> int:
    """Resolve a count or a percentage of ``of``: a count is returned unchanged, p % is max(1, floor(p / 100 * of)).

    The percentage is exact decimal arithmetic: 10 % of 119 is 11, and 29 % of 100 is 29, not the 28 of floats.
    """
    if isinstance(value, int):
        return value
    digits, _, fraction = value.rstrip("%").partition(".")
    scale: int = 10 ** len(fraction)
    return max(1, (int(digits) * scale + int(fraction or 0)) * of // (100 * scale))
