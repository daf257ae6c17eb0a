"""One range of one object: a GET that is checked, resumed at the byte it reached, and never trusted to be whole."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Final

from dpo_api.errors import StorageUnavailableError
from dpo_store.errors import ObjectChangedError
from dpo_store.options import MIB, ObjectInfo, RetryPolicy
from dpo_store.retry import PassingError, Patience
from dpo_store.uris import Location

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BLOCK: Final = MIB
"""Most bytes that are read at once, and of a block that is handed on."""
_ENOUGH: Final = MIB // 4
"""Less than this is joined with what follows: each block costs the two threads of a stream some time."""
_LEAST: Final = 64 * 1024
"""Fewest bytes that are asked for at once."""
_PROGRESS: Final = 64 * 1024
"""A try that brought this much was no failure in a row, however it ended."""
_CONTENT_RANGE: Final = re.compile(r"^bytes (\d+)-(\d+)/(\d+|\*)$")


def blocks(
    client: S3Client,
    location: Location,
    info: ObjectInfo,
    start: int,
    stop: int,
    *,
    patience: Patience,
    policy: RetryPolicy,
    monotonic: Callable[[], float],
    cancelled: Callable[[], bool] = lambda: False,
) -> Generator[bytes]:
    """Yield the bytes [start, stop) of the object that ``info`` describes, as they arrive, in blocks of at most BLOCK.

    It is one request as long as nothing goes wrong: boto3 needs about 2 ms of CPU for each. Every request carries
    If-Match, and the answer's range, ETag, total size and length are compared with what was asked; a body that ends
    early, stops or crawls is asked for again from the byte reached, so no byte is lost and none comes twice. Closing
    the generator closes the connection, whatever is still to come on it. Raises ObjectChangedError if the object is
    not the one of ``info``. Once ``cancelled()`` no more requests are sent.
    """
    at = start
    while at < stop and not cancelled():
        before = at
        try:
            with contextlib.closing(_open(client, location, info, at, stop)) as body:
                for block in _received(body, stop - at, policy, monotonic):
                    at += len(block)
                    yield block
        except Exception as error:  # noqa: BLE001 (Patience raises what is not passing)
            if at - before >= _PROGRESS:
                patience.progressed()
            patience.failed(error)


def _open(client: S3Client, location: Location, info: ObjectInfo, start: int, stop: int) -> Any:
    """Send the request and return its body, having compared the answer's headers with ``info``."""
    condition: dict[str, Any] = {"IfMatch": info.etag} if info.etag else {}
    answer: Any = client.get_object(
        Bucket=location.root, Key=location.path, Range=f"bytes={start}-{stop - 1}", **condition
    )
    body = answer["Body"]
    try:
        _check(answer, info, start, stop)
    except BaseException:
        body.close()
        raise
    return body


def _check(answer: Any, info: ObjectInfo, start: int, stop: int) -> None:
    # A server that ignores If-Match is found out here.
    etag = answer.get("ETag", "")
    if info.etag and etag and etag != info.etag:
        raise ObjectChangedError(f"{info.uri}: changed while it was being read (its ETag is another)")
    found = _CONTENT_RANGE.match(answer.get("ContentRange", ""))
    whole = start == 0 and stop == info.size
    if found is None:
        if not whole:
            raise StorageUnavailableError(f"{info.uri}: the storage does not answer range requests")
    else:
        first, last, total = int(found[1]), int(found[2]), found[3]
        if total != "*" and int(total) != info.size:
            raise ObjectChangedError(f"{info.uri}: changed its size from {info.size} to {total} bytes during the read")
        if (first, last) != (start, stop - 1):
            raise PassingError(f"asked for bytes {start}-{stop - 1}, the storage sent {first}-{last}")
    length = answer.get("ContentLength")
    if length != stop - start:
        raise PassingError(f"asked for {stop - start} bytes, the storage announced {length}")


def _received(body: Any, length: int, policy: RetryPolicy, monotonic: Callable[[], float]) -> Iterator[bytes]:
    """Yield exactly ``length`` bytes of an answer's body, or raise PassingError, having yielded all that came.

    What was received before an error is yielded first: the caller resumes after it.
    """
    # StreamingBody.read waits until its buffer is full, for ever if the server sends a byte now and then, and readinto
    # of it and of urllib3 copies what read returned. urllib3's read1 returns what is there, uncopied; botocore keeps
    # the response in this attribute.
    read1 = body._raw_stream.read1
    pieces: list[bytes] = []
    held, left, size = 0, length, _ENOUGH
    waited, brought = 0.0, 0
    problem: Exception | None = None
    while left > 0 and problem is None:
        # Only this wait counts: the time that the caller takes for a block is not the storage's.
        began = monotonic()
        try:
            piece = read1(min(size, BLOCK - held, left))
        except Exception as error:  # noqa: BLE001 (raised below, after what came before it)
            problem = error
            break
        waited += monotonic() - began
        if not piece:
            problem = PassingError(f"the answer was cut short by {left} of {length} bytes")
            break
        pieces.append(piece)
        held += len(piece)
        left -= len(piece)
        brought += len(piece)
        # Room for much more than arrives at once (16 KiB in TLS) takes time to get and to give back.
        size = min(max(2 * len(piece), _LEAST), BLOCK)
        if waited >= policy.slow_window:
            if brought < policy.slow_bytes and left > 0:
                problem = PassingError(f"the storage sent {brought} bytes in {waited:.0f} s")
            waited, brought = 0.0, 0
        if held >= _ENOUGH:
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces, held = [], 0
    if held:
        yield b"".join(pieces)
    if problem is not None:
        raise problem
