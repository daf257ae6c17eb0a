"""The rows of a data file as Python objects: JSON lines, Parquet, or Arrow."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from dpo_api.errors import InvalidDataError
from dpo_api.inputs import TABLES, DataFormat
from dpo_store import ObjectInfo, Store
from dpo_trainer.data.problems import Problem, Reason, UnusableError, kind_of

_MAGICS: dict[bytes, DataFormat] = {b"PAR1": "parquet", b"ARROW1": "arrow"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Row:
    """One row. ``number``: its line, or its position in a table, from 1. ``size``: bytes of its text, about."""

    number: int
    content: dict[str, Any] | Problem
    size: int


def place(uri: str, format: DataFormat, number: int) -> str:  # noqa: A002 - the word for it
    """Return how messages name a row: ``file:12``, or in a table ``file:row 12``."""
    return f"{uri}:{number}" if format == "jsonl" else f"{uri}:row {number}"


def read_rows(store: Store, info: ObjectInfo, format: DataFormat, names: frozenset[str]) -> Iterator[Row]:  # noqa: A002
    """Yield a file's rows in order; blank lines are left out.

    ``names``: the columns of a table that are read. A row that cannot be read alone has a Problem as its content.
    Raises InvalidDataError for a file that is damaged or of another format, and whatever the store raises.
    """
    if format == "jsonl":
        return _lines(store, info)
    from dpo_trainer.data.reading.tables import read_table  # Arrow takes a third of a second to load

    return read_table(store, info, format, names)


def _lines(store: Store, info: ObjectInfo) -> Iterator[Row]:
    for number, line in store.lines(info):
        if number == 1:
            _refuse_table(info.uri, line)
        if line.strip():
            yield Row(number, load_line(line), len(line) + 1)


def _refuse_table(uri: str, line: bytes) -> None:
    for magic, found in _MAGICS.items():
        if line.startswith(magic):
            endings = " or ".join(suffix for suffix, named in TABLES.items() if named == found)
            raise InvalidDataError(
                f"{uri}: is {'a Parquet' if found == 'parquet' else 'an Arrow'} file, not JSON lines; set the source's"
                f" format: {found}, or give it a name that ends in {endings}"
            )


def load_line(line: bytes) -> dict[str, Any] | Problem:
    """Return the object of one line (UTF-8 JSON, a BOM at its start is skipped)."""
    try:
        return _load(line)
    except UnusableError as error:
        return error.problem


def _load(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig")  # drops a BOM
        row = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UnusableError(Reason.BROKEN_JSON, f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        raise UnusableError(Reason.BROKEN_JSON, f"broken JSON: {problem} at column {error.colno}") from error
    except RecursionError as error:
        raise UnusableError(Reason.BROKEN_JSON, "broken JSON: nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise UnusableError(Reason.BROKEN_JSON, f"broken JSON: {error}") from error
    if not isinstance(row, dict):
        raise UnusableError(Reason.NOT_AN_OBJECT, f"the line is {kind_of(row)}, expected a JSON object")
    try:
        if _SURROGATE.search(text):  # "\ud83d\ude42" is one character, "\ud83d" alone half of one: no text
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnusableError(Reason.BAD_TEXT, "holds half of a surrogate pair (a lone \\ud800–\\udfff)") from error
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise UnusableError(Reason.BROKEN_JSON, f"broken JSON: {name} is not a JSON number")
