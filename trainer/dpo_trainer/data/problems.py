"""Why a row cannot be used."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a row is not used; the values are the keys of ``stats["dropped"]`` and of the metrics."""

    BROKEN_JSON = "brokenJson"
    NOT_AN_OBJECT = "notAnObject"
    MISSING_KEY = "missingKey"
    WRONG_TYPE = "wrongType"
    BAD_MESSAGE = "badMessage"
    BAD_TOOLS = "badTools"
    BAD_REWARD = "badReward"
    BAD_TEXT = "badText"
    BAD_RANKING = "badRanking"
    TIE = "tie"
    EMPTY_RESPONSE = "emptyResponse"
    EMPTY_PROMPT = "emptyPrompt"
    NO_COMMON_PROMPT = "noCommonPrompt"
    UNSUPPORTED_COLUMN = "unsupportedColumn"
    TEMPLATE = "template"
    NOT_A_PREFIX = "promptNotPrefix"
    OVER_LENGTH = "overLength"
    NO_ROOM = "noRoomForResponse"


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used. ``message`` is a clause that follows ``file:line: `` or ``file:row N: ``."""

    reason: Reason
    message: str


class UnusableError(Exception):
    """A Problem on its way up."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(reason, message)


_KINDS = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "a list",
    bytes: "binary data",
}


def kind_of(value: object) -> str:
    """Return what a value is, for messages: ``a list``."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)
