"""Files and streams to S3: one request if small, in parts if large; complete or absent, never half."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dpo_api.errors import DPOError, NotFoundError
from dpo_store.errors import ObjectChangedError, from_os_error
from dpo_store.options import MIB
from dpo_store.retry import Patience
from dpo_store.uris import Location

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART: Final = 16 * MIB
"""Bytes of a part, unless the file needs larger ones; smaller files go in one request."""
_BLOCK: Final = MIB
_MOST_PARTS: Final = 10_000
_TOGETHER: Final = 2
"""Parts under way at once; a folder has several files under way too, see dpo_store.trees."""

NewPatience = Callable[[str], Patience]


def content_md5(data: bytes) -> str:
    """Return the Content-MD5 header, with which every S3 server checks what arrives."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def part_size(size: int) -> int:
    """Return the bytes of a part of a file of this size: S3 allows 10,000 parts."""
    return max(PART, -(-size // _MOST_PARTS))


def upload(client: S3Client, source: Path, location: Location, patience: NewPatience) -> None:
    """Store a file. Holds at most two parts in memory: 32 MiB for files up to 160 GB."""
    try:
        size = source.stat().st_size
        with source.open("rb") as file:
            store(client, iter(lambda: file.read(_BLOCK), b""), size, location, patience)
    except OSError as error:
        raise from_os_error(error, str(source)) from error
    except _WrongSizeError as error:
        raise ObjectChangedError(f"{source}: changed its size while it was being uploaded") from error


def store(
    client: S3Client, blocks: Iterable[bytes | memoryview], size: int, location: Location, patience: NewPatience
) -> None:
    """Store an object of ``size`` bytes as its blocks arrive, in parts if it is large. Memory: as for ``upload``."""
    parts = _parts(blocks, size, part_size(size))
    if size <= PART:
        data = next(parts)
        digest = content_md5(data)
        patience(str(location)).run(
            lambda: client.put_object(Bucket=location.root, Key=location.path, Body=data, ContentMD5=digest)
        )
    else:
        _in_parts(client, parts, size, location, patience)


class _WrongSizeError(RuntimeError):
    """The blocks are not of the size that was announced."""


def _parts(blocks: Iterable[bytes | memoryview], size: int, step: int) -> Iterator[bytes]:
    """Cut ``size`` bytes of blocks into parts of ``step`` bytes; one part if there are none."""
    held = bytearray()
    sent = 0
    for block in blocks:
        held += block
        while len(held) >= step and sent + step < size:
            yield bytes(memoryview(held)[:step])
            del held[:step]
            sent += step
    if sent + len(held) != size:
        raise _WrongSizeError(f"{sent + len(held):,} bytes came, not {size:,}")
    yield bytes(held)


def _in_parts(client: S3Client, parts: Iterator[bytes], size: int, location: Location, patience: NewPatience) -> None:
    where: dict[str, Any] = {"Bucket": location.root, "Key": location.path}
    uri = str(location)
    # A retried request may open a second upload that nobody completes; S3's lifecycle rules remove those.
    upload_id = patience(uri).run(lambda: client.create_multipart_upload(**where))["UploadId"]
    where["UploadId"] = upload_id

    def send(number: int, data: bytes) -> dict[str, Any]:
        digest = content_md5(data)
        answer = patience(uri).run(lambda: client.upload_part(**where, PartNumber=number, Body=data, ContentMD5=digest))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    sent: list[dict[str, Any]] = []
    under_way: deque[Future[dict[str, Any]]] = deque()
    try:
        with ThreadPoolExecutor(max_workers=_TOGETHER, thread_name_prefix="dpo-store") as pool:
            try:
                for number, data in enumerate(parts, start=1):
                    under_way.append(pool.submit(send, number, data))
                    del data
                    if len(under_way) == _TOGETHER:
                        sent.append(under_way.popleft().result())
                sent += [future.result() for future in under_way]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        _complete(client, where, sent, size, patience(uri))
    except BaseException:
        # Parts of an abandoned upload cost money until someone removes them.
        with contextlib.suppress(Exception):
            client.abort_multipart_upload(**where)
        raise


def _complete(client: S3Client, where: dict[str, Any], parts: list[Any], size: int, patience: Patience) -> None:
    """Join the parts. A first try whose answer was lost has removed the upload: then the object itself is the proof."""

    def attempt() -> None:
        try:
            client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
        except Exception as error:
            code = getattr(error, "response", {}).get("Error", {}).get("Code")
            if code != "NoSuchUpload" or patience.failures == 0:
                raise
            head = client.head_object(Bucket=where["Bucket"], Key=where["Key"])
            if head["ContentLength"] != size:
                raise

    try:
        patience.run(attempt)
    except NotFoundError as error:
        raise DPOError(str(error)) from error
