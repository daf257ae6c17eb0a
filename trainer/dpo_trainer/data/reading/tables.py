"""Rows of Parquet and Arrow files, read in batches through range requests, and only the columns that are needed.

Memory: of Parquet, a buffer for each column, a page of it, and a batch of rows; of Arrow, one of the file's record
batches. Neither grows with the number of rows in a file.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_api.errors import DPOError, InvalidDataError
from dpo_api.inputs import DataFormat
from dpo_api.seekable import Seekable
from dpo_store import ObjectInfo, Store
from dpo_trainer.data.problems import Problem, Reason
from dpo_trainer.data.reading.rows import Row, place

_BUFFER = 2 << 20
"""Bytes of one read of a column."""
_MAX_ROWS = 256
_BATCH_BYTES = 4 << 20
_MAX_ROW = 64 << 20
"""Largest row in bytes, as the largest line of JSON."""
_BROKEN = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError)
"""What Arrow raises for damaged files: they can declare more bytes than there is memory, and names that are no text."""

_PARQUET, _ENCRYPTED = b"PAR1", b"PARE"
_ARROW_FILE, _FEATHER_1, _STREAM = b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"


class _File(Seekable, io.RawIOBase):
    """An object as a file that Arrow can seek in. Each read is a range request for the version that was listed."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        super().__init__(info.size)
        self._store, self._info = store, info
        self.failure: DPOError | None = None

    def read(self, size: int | None = -1) -> bytes:
        length = self.given(size)
        if not length:
            return b""
        try:
            data = self._store.read(self._info, self.at, length)
        except DPOError as error:
            self.failure = error  # Arrow hands on what it likes of it
            raise
        self.at += len(data)
        return data


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a file that is read from its start to its end."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        parts, missing = [], float("inf") if size is None or size < 0 else size
        while missing > 0:
            block = self._rest or next(self._blocks, b"")
            if not block:
                break
            part = block if len(block) <= missing else block[: int(missing)]
            self._rest = block[len(part) :]
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


def read_table(store: Store, info: ObjectInfo, format: DataFormat, names: frozenset[str]) -> Iterator[Row]:  # noqa: A002
    """Yield a table's rows with the columns of these names; all other columns are None. See ``rows.read_rows``."""
    file = _File(store, info)
    head = file.read(len(_ARROW_FILE))
    file.seek(0)
    done = None  # rows; None: not opened yet
    try:
        batches = _parquet(file, info, head, names) if format == "parquet" else _arrow(store, file, info, head, names)
        for held, batch in batches:
            done = done or 0
            yield from _rows(batch, held, info, format, done)
            done += batch.num_rows
    except _BROKEN as error:
        if file.failure is not None:
            raise file.failure from error
        where = info.uri if done is None else place(info.uri, format, done + 1)
        raise InvalidDataError(
            f"{where}: damaged {format.capitalize()} data ({_first_line(error)}); copy or write the file again"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:200]
    return text.rstrip(".") or type(error).__name__


def _parquet(
    file: _File, info: ObjectInfo, head: bytes, names: frozenset[str]
) -> Iterator[tuple[Sequence[str], pa.RecordBatch]]:
    if head.startswith(_ENCRYPTED):
        raise InvalidDataError(f"{info.uri}: is an encrypted Parquet file; write it without encryption")
    if not head.startswith(_PARQUET):
        raise InvalidDataError(f"{info.uri}: {_not('a Parquet file', head)}")
    # Buffered by column, a row group is read a page at a time; read ahead, all of its columns would be held.
    table = pq.ParquetFile(
        pa.PythonFile(file, mode="r"), buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
    )
    held = table.schema_arrow.names
    wanted = [name for name in held if name in names]
    for group in range(table.num_row_groups):
        size = _rows_of_batch(table.metadata.row_group(group), f"{info.uri}: row group {group + 1}")
        for batch in table.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False):
            yield held, batch


def _rows_of_batch(group: pq.RowGroupMetaData, where: str) -> int:
    """Rows of about ``_BATCH_BYTES``. Raises InvalidDataError if a row group declares more than its rows may hold."""
    # Of all columns: what pyarrow says of a single one ends the process if it is damaged.
    rows, size = int(group.num_rows), int(group.total_byte_size)
    if size > _MAX_ROW * max(rows, 1):
        raise InvalidDataError(f"{where}: declares {size:,} bytes in {rows:,} rows, more than {_MAX_ROW:,} bytes a row")
    return max(1, min(_MAX_ROWS, _BATCH_BYTES * rows // max(size, 1)))


def _arrow(
    store: Store, file: _File, info: ObjectInfo, head: bytes, names: frozenset[str]
) -> Iterator[tuple[Sequence[str], pa.RecordBatch]]:
    if head.startswith(_FEATHER_1):
        raise InvalidDataError(f"{info.uri}: is a Feather file of version 1; write it again as version 2")
    if head.startswith(_ARROW_FILE):
        held = pa.ipc.open_file(pa.PythonFile(file, mode="r")).schema.names
        reader = pa.ipc.open_file(pa.PythonFile(file, mode="r"), options=_reading(held, names))
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    elif head.startswith(_STREAM):  # the form in which Hugging Face's datasets are saved
        held = pa.ipc.open_stream(pa.PythonFile(file, mode="r")).schema.names
        # A stream's reader asks for a few bytes at a time.
        blocks = _Blocks(store.stream(info))
        batches = iter(pa.ipc.open_stream(pa.PythonFile(blocks, mode="r"), options=_reading(held, names)))
    else:
        raise InvalidDataError(f"{info.uri}: {_not('an Arrow file or stream', head)}")
    for batch in batches:
        batch.validate(full=True)  # the offsets in the file are otherwise believed
        for start in range(0, batch.num_rows, _MAX_ROWS):
            yield held, batch.slice(start, _MAX_ROWS)


def _reading(held: Sequence[str], names: frozenset[str]) -> pa.ipc.IpcReadOptions:
    wanted = [number for number, name in enumerate(held) if name in names]
    return pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)


def _not(kind: str, head: bytes) -> str:
    return f"is not {kind}: it begins with {head!r}; set the source's format, or take the ending off the file's name"


def _rows(batch: pa.RecordBatch, held: Sequence[str], info: ObjectInfo, format: DataFormat, done: int) -> Iterator[Row]:  # noqa: A002
    """Yield a batch's rows. ``held``: the names of all the file's columns; ``done``: the rows before the batch."""
    size = batch.nbytes // max(1, batch.num_rows)
    if batch.nbytes > _MAX_ROW:
        for at in range(batch.num_rows):
            if batch.slice(at, 1).nbytes > _MAX_ROW:
                raise InvalidDataError(f"{place(info.uri, format, done + at + 1)}: is larger than {_MAX_ROW:,} bytes")
    blank: dict[str, Any] = dict.fromkeys(held)
    for at, content in enumerate(_contents(batch)):
        row = content if isinstance(content, Problem) else {**blank, **content}
        yield Row(done + at + 1, row, size)


def _contents(batch: pa.RecordBatch) -> list[dict[str, Any] | Problem]:
    try:
        return [_values(row) for row in batch.to_pylist(maps_as_pydicts="strict")]
    except (UnicodeDecodeError, KeyError, ValueError, OverflowError):
        if batch.num_rows > 1:
            return [content for at in range(batch.num_rows) for content in _contents(batch.slice(at, 1))]
        return [Problem(Reason.BAD_TEXT, _unreadable(batch))]


def _unreadable(batch: pa.RecordBatch) -> str:
    """Say which column of the one row cannot be converted, and why."""
    for name in batch.schema.names:
        try:
            batch.column(name).to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            return f'"{name}" is not UTF-8 (byte {error.start + 1} of a text)'
        except (KeyError, ValueError, OverflowError) as error:
            return f'"{name}" cannot be read ({_first_line(error)})'
    return "cannot be read"


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Leave out the fields of structs that are null: every struct of a column has all the fields of its type."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
