"""Decompressed copies of gzip objects in the node's cache, for what has to be read by ranges."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from dpo_api.errors import InvalidModelError
from dpo_store.cache import cache_folder, exclusive
from dpo_store.errors import from_os_error
from dpo_store.options import MIB, ObjectInfo

if TYPE_CHECKING:
    from dpo_store.store import Store

LARGEST_RATIO: Final = 100
"""A copy may have this many times the bytes of the object. Weights compress to half at best; gzip allows 1032."""
_GZIP: Final = 31  # zlib's number for a gzip header and its checksum


def local_copy(store: Store, info: ObjectInfo) -> ObjectInfo:
    """Return the decompressed copy of a gzip object, which is made by one process of the node and kept.

    Memory: a few MiB. Raises InvalidModelError for an object that is damaged or would become far too large.
    """
    key = hashlib.sha256(f"{info.uri}\n{info.etag}\n{info.size}".encode()).hexdigest()[:32]
    path = cache_folder() / "archives" / key
    with exclusive(path.with_suffix(".lock")):
        if not path.exists():
            part = path.with_suffix(".part")
            try:
                with part.open("wb") as file:
                    for block in _decompressed(store, info):
                        file.write(block)
                part.replace(path)
            except OSError as error:
                raise from_os_error(error, f"{part} (the cache; DPO_CACHE_DIR moves it)") from error
            finally:
                part.unlink(missing_ok=True)
        os.utime(path)
    return ObjectInfo(str(path), path.stat().st_size, "")  # without an ETag: on each node it is another file


def _decompressed(store: Store, info: ObjectInfo) -> Iterator[bytes]:
    left = LARGEST_RATIO * max(info.size, MIB)
    decoder = zlib.decompressobj(_GZIP)
    try:
        for packed in store.stream(info):
            data = packed
            while data:
                if decoder.eof:  # the next of several that follow each other
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    decoder = zlib.decompressobj(_GZIP)
                block = decoder.decompress(data, 4 * MIB)
                left -= len(block)
                if left < 0:
                    raise InvalidModelError(
                        f"{info.uri}: it decompresses to more than {LARGEST_RATIO} times its size; do not use this file"
                    )
                yield block
                data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
    except zlib.error as error:
        raise InvalidModelError(f"{info.uri}: cannot be decompressed ({error}); copy or download it again") from None
    if not decoder.eof:
        raise InvalidModelError(f"{info.uri}: it ends early; copy or download it again")
