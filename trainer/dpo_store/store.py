"""The one interface to objects: an address in, bytes out."""

from __future__ import annotations

import builtins  # `list` is a method here
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_api.errors import NotFoundError
from dpo_store import decompress, find, readahead, trees, uris
from dpo_store import lines as text
from dpo_store.hub import HubBackend
from dpo_store.local import LocalBackend
from dpo_store.options import READ_AHEAD, ObjectInfo, RetryPolicy, StorageOptions, Timing
from dpo_store.uris import Location

if TYPE_CHECKING:
    from dpo_store.find import Backend
    from dpo_store.s3 import S3Backend


def open_store(
    options: StorageOptions | None = None, *, retry: RetryPolicy | None = None, timing: Timing | None = None
) -> Store:
    """Return a store. Cheap and without side effects: S3 is contacted at the first ``s3://`` address."""
    return Store(options or StorageOptions(), retry or RetryPolicy(), timing or Timing())


class Store:
    """Objects by address. Every method may raise NotFoundError, AccessDeniedError, StorageUnavailableError.

    Safe for threads; after a fork make a new one.
    """

    def __init__(self, options: StorageOptions, retry: RetryPolicy, timing: Timing) -> None:
        self.options = options
        self._retry = retry
        self._timing = timing
        self._local = LocalBackend(options.pvc_root)
        self._hub = HubBackend(retry, timing, options.hub_cache)
        self._lock = threading.Lock()
        self._s3: S3Backend | None = None

    def _backend(self, location: Location) -> Backend:
        if location.scheme == "hf":
            return self._hub
        if location.scheme != "s3":
            return self._local
        with self._lock:
            if self._s3 is None:
                from dpo_store.s3 import S3Backend

                self._s3 = S3Backend(self.options, self._retry, self._timing)
            return self._s3

    def commit(self, uri: str) -> str:
        """Return the commit that the revision of a hub's address stands for now."""
        location = uris.parse(uri)
        if location.scheme != "hf":
            raise ValueError(f"{uri} is not on the hub")
        return self._hub.commit(location)

    # -- finding

    def expand(self, uri: str) -> list[ObjectInfo]:
        """Return the objects an address stands for, sorted by key; never an empty list.

        One object; or all below a folder, if the address ends with ``/``; or those that match a pattern: ``*`` any
        characters but ``/``, ``**`` any characters, ``?`` one character but ``/``. Raises NotFoundError, with the
        nearest existing name, if there is none.
        """
        location = uris.parse(uri)
        return find.expand(self._backend(location), location)

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one object. Raises NotFoundError if there is none (or if it is a folder)."""
        location = uris.parse(uri)
        return self._backend(location).stat(location)

    def exists(self, uri: str) -> bool:
        """Say whether there is an object of this name, or for an address that ends with ``/`` any below it."""
        location = uris.parse(uri)
        backend = self._backend(location)
        try:
            if uri.endswith("/"):
                return next(iter(backend.list(location)), None) is not None
            backend.stat(location)
        except NotFoundError:
            return False
        return True

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Describe every object below a folder, sorted by key; none if there is no such folder."""
        location = uris.as_folder(uris.parse(folder))
        return self._backend(location).list(location)

    def children(self, folder: str) -> builtins.list[str]:
        """Return the names directly in a folder, sorted, those of folders with ``/`` at the end; [] if it is absent."""
        location = uris.as_folder(uris.parse(folder))
        return self._backend(location).children(location)

    # -- reading

    def read(self, source: str | ObjectInfo, start: int = 0, length: int | None = None) -> bytes:
        """Return ``length`` bytes from ``start``, fewer at the end, all by default.

        For an ObjectInfo S3 gets one request, for an address two. An object that has changed since it was described is
        an ObjectChangedError.
        """
        known = None if isinstance(source, str) else source
        location = uris.parse(source if isinstance(source, str) else source.uri)
        return self._backend(location).read(location, start, length, known)

    def decompressed(self, info: ObjectInfo) -> ObjectInfo:
        """Return a gzip object's decompressed copy in the node's cache: see ``decompress.local_copy``."""
        return decompress.local_copy(self, info)

    def stream(self, source: str | ObjectInfo, ahead: int = READ_AHEAD, start: int = 0) -> Iterator[bytes]:
        """Yield an object's bytes from ``start`` in blocks of at most 1 MiB.

        From S3 it is one request, read up to ``ahead`` bytes ahead of the caller by a thread (0: by the caller); memory
        is at most these bytes and 3 MiB. An object that changes meanwhile is an ObjectChangedError: bytes of two
        versions are never mixed. Close the iterator to stop early.
        """
        info = self.stat(source) if isinstance(source, str) else source
        location = uris.parse(info.uri)
        backend = self._backend(location)
        if isinstance(backend, LocalBackend | HubBackend):
            return backend.stream(location, info, start)
        s3 = backend
        return readahead.stream(lambda cancelled: s3.blocks(location, info, start, info.size, cancelled), ahead)

    def lines(self, source: str | ObjectInfo) -> Iterator[tuple[int, bytes]]:
        """Yield (line number from 1, line without its end) of a text file, .gz or .zst decompressed on the way.

        Blank lines are yielded too. Raises InvalidDataError for truncated or damaged compression and for a line above
        64 MiB. See :mod:`dpo_store.lines`.
        """
        name = source if isinstance(source, str) else source.uri
        return text.lines(self.stream(source), name)

    # -- writing

    def write(self, uri: str, data: bytes) -> None:
        """Replace an object's content in one step: readers see the old content or the new."""
        location = uris.parse(uri)
        self._backend(location).write(location, data)

    def write_blocks(self, uri: str, blocks: Iterable[bytes | memoryview], size: int) -> None:
        """Write an object of ``size`` bytes as its blocks arrive. It appears when it is complete."""
        location = uris.parse(uri)
        self._backend(location).write_blocks(location, blocks, size)

    def delete(self, uri: str) -> None:
        """Remove an object; no error if there is none."""
        location = uris.parse(uri)
        self._backend(location).delete(location)

    def delete_tree(self, folder: str) -> None:
        """Remove every object below a folder; no error if there is none."""
        location = uris.as_folder(uris.parse(folder))
        trees.delete_tree(self._backend(location), location)

    # -- files

    def upload(self, path: str | Path, uri: str) -> None:
        """Copy a local file to an address, in parts if it is large. The object appears when it is complete."""
        location = uris.parse(uri)
        self._backend(location).put_file(Path(path), location)

    def download(self, source: str | ObjectInfo, path: str | Path) -> None:
        """Copy an object to a local file, which appears when it is complete.

        Raises NoSpaceError before the first byte if the file system is too full.
        """
        info = self.stat(source) if isinstance(source, str) else source
        trees.download(self.stream(info), info, Path(path))

    def upload_tree(self, folder: str | Path, uri: str) -> builtins.list[str]:
        """Copy every file below a local folder to below an address; return the relative names, sorted."""
        return trees.upload_tree(self.upload, Path(folder), uri)

    def download_tree(self, uri: str, folder: str | Path) -> builtins.list[str]:
        """Copy every object below an address into a local folder; return the relative names, sorted.

        Raises NotFoundError if there is none, NoSpaceError before the first byte if they do not fit.
        """
        prefix = str(uris.as_folder(uris.parse(uri)))
        return trees.download_tree(self.expand(prefix), prefix, self.download, Path(folder))
