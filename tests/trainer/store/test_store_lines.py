from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_api.errors import InvalidDataError
from dpo_store.lines import lines

TEXT = st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\r", b"\n\n", b"{}", b"\xc3\xbc", b"\0", b"z" * 300])).map(
    b"".join
)


def cut(data: bytes, seed: int, longest: int = 50) -> Iterator[bytes]:
    """Cut data into blocks of random lengths, some of them empty."""
    rng = random.Random(seed)
    at = 0
    while at < len(data):
        step = rng.randrange(longest)
        yield data[at : at + step]
        at += step


def expected(data: bytes) -> list[tuple[int, bytes]]:
    """The lines by another way: bytes.split, and CR LF by removing one CR."""
    parts = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if parts[-1] == b"":
        parts.pop()
    return [(n, part.removesuffix(b"\r")) for n, part in enumerate(parts, start=1)]


def packed_gzip(data: bytes, members: int) -> bytes:
    size = -(-len(data) // members) or 1
    return b"".join(gzip.compress(data[i * size : (i + 1) * size]) for i in range(members))


def packed_zstd(data: bytes, frames: int) -> bytes:
    size = -(-len(data) // frames) or 1
    # Without content sizes, as a pipe writes them; the second frame has a checksum.
    return b"".join(
        zstandard.ZstdCompressor(write_content_size=i != 0, write_checksum=i == 1).compress(
            data[i * size : (i + 1) * size]
        )
        for i in range(frames)
    )


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(0, 99), st.integers(1, 4), st.sampled_from(["", ".gz", ".zst"]))
def test_every_line_once_with_its_number(data: bytes, seed: int, pieces: int, suffix: str) -> None:
    pack = {"": lambda d, _: d, ".gz": packed_gzip, ".zst": packed_zstd}[suffix]
    assert list(lines(cut(pack(data, pieces), seed), "t.jsonl" + suffix)) == expected(data)


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert list(lines(iter([b"\xef", b"\xbb\xbf{}\n", b"{}"]), "t.jsonl")) == [(1, b"{}"), (2, b"{}")]


def test_compression_is_known_by_content_where_the_name_says_nothing() -> None:
    assert list(lines(iter([gzip.compress(b"a\nb\n")]), "part-00000")) == [(1, b"a"), (2, b"b")]
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0meta"
    assert list(lines(iter([skippable + zstandard.compress(b"a\nb\n")]), "part-00000")) == [(1, b"a"), (2, b"b")]


def test_gzip_padded_with_zeros_is_whole() -> None:
    data = gzip.compress(b"a\n") + gzip.compress(b"b\n") + b"\0" * 700
    assert list(lines(cut(data, 1), "t.gz")) == [(1, b"a"), (2, b"b")]


@pytest.mark.parametrize(("pack", "name"), [(packed_gzip, "t.gz"), (packed_zstd, "t.zst")])
def test_a_truncated_file_is_named_at_every_length(pack: Callable[[bytes, int], bytes], name: str) -> None:
    data = random.Random(3).randbytes(300).hex().encode()
    first, whole = len(pack(data[: len(data) // 2], 1)), pack(data, 2)
    for stop in range(len(whole)):
        if stop == first:
            continue  # two whole files may follow each other, so a cut between them can't be seen
        with pytest.raises(InvalidDataError, match=f"^s3://b/{name}: "):
            list(lines(iter([whole[:stop]]), f"s3://b/{name}"))


@pytest.mark.parametrize(("pack", "name"), [(packed_gzip, "t.gz"), (packed_zstd, "t.zst")])
def test_a_flipped_bit_is_found(pack: Callable[[bytes, int], bytes], name: str) -> None:
    data = pack(b"0123456789" * 500, 2)
    # The last byte of the second member or frame belongs to its checksum or size.
    broken = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(InvalidDataError, match=f"{name}: damaged"):
        list(lines(iter([broken]), name))


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst", "T.GZ"])
@pytest.mark.parametrize("content", [b"", b"{}\n", b"\x1f", b"PK\x03\x04"])
def test_a_name_that_promises_compression_must_keep_it(name: str, content: bytes) -> None:
    with pytest.raises(InvalidDataError, match=r"is empty|does not begin as|truncated"):
        list(lines(iter([content]), name))


def test_garbage_after_gzip_is_refused() -> None:
    with pytest.raises(InvalidDataError, match=r"t\.gz: "):
        list(lines(iter([gzip.compress(b"a\n") + b"garbage"]), "t.gz"))
    with pytest.raises(InvalidDataError, match="after the end"):
        list(lines(iter([gzip.compress(b"a\n") + b"\0\0garbage"]), "t.gz"))


def test_an_endless_line_stops_at_the_bound() -> None:
    blocks = itertools.chain([b"ok\n"], itertools.repeat(b"x" * 1000))
    found = lines(blocks, "t.jsonl", max_line=10_000)
    assert next(found) == (1, b"ok")
    with pytest.raises(InvalidDataError, match=r"t\.jsonl:2: the line is longer than 10,000 bytes"):
        next(found)


def test_a_long_line_inside_one_block_stops_too() -> None:
    with pytest.raises(InvalidDataError, match=r"t:2: the line is longer"):
        list(lines(iter([b"a\n" + b"x" * 200 + b"\nb\n"]), "t", max_line=100))
    assert len(list(lines(iter([b"a\n" + b"x" * 100 + b"\nb\n"]), "t", max_line=100))) == 3
