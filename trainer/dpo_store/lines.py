"""Lines of text files, plain or compressed, in bounded memory.

Memory beside the source's own: one block, one line (at most ``MAX_LINE``), and when decompressing 1 MiB of output for
gzip, or for zstd the frame's window (at most 128 MiB, zstd's own limit; usually 8 MiB or less) and the output of
256 bytes of input (at most 8 MiB, whatever the file holds).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

import zstandard

from dpo_api.errors import InvalidDataError
from dpo_store.options import MIB

MAX_LINE: Final = 64 * MIB
"""Longest line in bytes, as uncompressed text. No pair of texts that fits a model comes near."""

_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_BOM: Final = b"\xef\xbb\xbf"
_OUTPUT: Final = MIB
# zstd can turn 4 bytes into a block of 128 KiB, and its decompressor returns all output of an input at once.
_ZSTD_INPUT: Final = 256
_ZSTD_WINDOW: Final = 1 << 27


def lines(blocks: Iterator[bytes], name: str, max_line: int = MAX_LINE) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a file given as blocks of bytes.

    Decompresses by the content's magic number; a name that ends in .gz or .zst must have such content. Lines end with
    LF or CR LF, which is removed; the last line may have no line end; a UTF-8 byte order mark is removed. Raises
    InvalidDataError, naming the file, for damaged or truncated compression and for a line longer than ``max_line``.
    """
    for number, line in enumerate(_split(decompress(blocks, name), name, max_line), start=1):
        if number == 1 and line.startswith(_BOM):
            line = line[len(_BOM) :]  # noqa: PLW2901
        yield number, line[:-1] if line.endswith(b"\r") else line


def _split(blocks: Iterator[bytes], name: str, max_line: int) -> Iterator[bytes]:
    """Cut blocks at LF. A line in pieces is joined once, so long lines cost linear time."""
    pieces: list[bytes] = []
    held = 0
    number = 1

    def check(length: int, ahead: int = 0) -> None:
        if length > max_line:
            raise InvalidDataError(
                f"{name}:{number + ahead}: the line is longer than {max_line:,} bytes; write one JSON object a line"
            )

    for block in blocks:
        first, *rest = block.split(b"\n")
        held += len(first)
        check(held)
        pieces.append(first)
        if not rest:
            continue
        if len(block) > max_line:
            for ahead, line in enumerate(rest, start=1):
                check(len(line), ahead)
        yield b"".join(pieces)
        yield from rest[:-1]
        number += len(rest)
        pieces, held = [rest[-1]], len(rest[-1])
    if held:
        yield b"".join(pieces)


def decompress(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of a gzip or zstd file (of any number of members or frames), or the blocks as they are."""
    head = b""
    for block in blocks:
        head += block
        if len(head) >= len(_ZSTD_MAGIC):
            break
    everything = _chain(head, blocks)
    lowered = name.lower()
    if head.startswith(_GZIP_MAGIC):
        return _gunzip(everything, name)
    if head.startswith(_ZSTD_MAGIC) or _is_skippable(head):
        return _unzstd(everything, name)
    for suffix, kind in ((".gz", "gzip"), (".zst", "zstd")):
        if lowered.endswith(suffix):
            problem = "is empty" if not head else f"does not begin as {kind} data does"
            raise InvalidDataError(f"{name}: {problem}; write it again, or take {suffix} off its name if it is text")
    return everything


def _chain(head: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from blocks


def _is_skippable(head: bytes) -> bool:
    # Frames of metadata (pzstd, seekable zstd): 0x184D2A5? in little endian.
    return len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50


def _gunzip(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    started = True
    padding = False
    for block in blocks:
        data = block
        while data:
            if not started:
                # Members follow each other; tape tools pad the end with zeros.
                stripped = data.lstrip(b"\0")
                padding = padding or len(stripped) < len(data)
                data = stripped
                if not data:
                    break
                if padding:
                    raise InvalidDataError(f"{name}: there is data after the end of the gzip content")
                member, started = zlib.decompressobj(wbits=31), True
            try:
                out = member.decompress(data, _OUTPUT)
            except zlib.error as error:
                raise InvalidDataError(f"{name}: damaged gzip data ({error})") from error
            if out:
                yield out
            if member.eof:
                data, started = member.unused_data, False
            else:
                data = member.unconsumed_tail
    if started:
        # zlib may hold output back although it has all input: what is missing then is the member's end.
        raise InvalidDataError(f"{name}: truncated, the gzip data ends in the middle; copy or write it again")


def _unzstd(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = None
    for block in blocks:
        for at in range(0, len(block), _ZSTD_INPUT):
            data = block[at : at + _ZSTD_INPUT]
            while data:
                if frame is None:
                    frame = decompressor.decompressobj()
                try:
                    out = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise InvalidDataError(f"{name}: damaged zstd data ({error})") from error
                if out:
                    yield out
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame is not None:
        raise InvalidDataError(f"{name}: truncated, the zstd data ends in the middle; copy or write it again")
