"""Folders and files: local paths, ``file://``, mounted claims."""

from __future__ import annotations

import builtins  # `list` is a method here
import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from dpo_api.errors import NoSpaceError
from dpo_api.texts import sizes
from dpo_store.errors import ObjectChangedError, from_os_error
from dpo_store.options import MIB, ObjectInfo
from dpo_store.uris import Location, as_folder, to_path

_BLOCK: Final = MIB // 4
_TEMPORARY: Final = ".dpo-partial"
"""Suffix of files being written: never listed, left behind only by a killed process."""


class LocalBackend:
    """The operations of a Store on files. Every OSError leaves as one of our errors."""

    def __init__(self, pvc_root: str | None = None) -> None:
        self._pvc_root = pvc_root

    def path(self, location: Location) -> Path:
        """Return the path of a location."""
        return to_path(location, self._pvc_root)

    def stat(self, location: Location) -> ObjectInfo:
        """Describe one file."""
        path = self.path(location)
        with _translated(str(location)):
            found = path.stat()
            if path.is_dir():
                raise IsADirectoryError(21, "Is a directory")
        return ObjectInfo(str(location), found.st_size, _etag(found))

    def list(self, location: Location) -> Iterator[ObjectInfo]:
        """Describe every file below a folder, in the order of the whole relative paths; nothing if there is none."""
        base = self.path(location)
        prefix = as_folder(location).path
        with _translated(str(location)):
            for name in _walk(base) if base.is_dir() else ():
                # A file that vanishes meanwhile, or a link to nowhere, is not there.
                with contextlib.suppress(FileNotFoundError):
                    found = (base / name).stat()
                    yield ObjectInfo(str(location.at(prefix + name)), found.st_size, _etag(found))

    def children(self, location: Location) -> builtins.list[str]:
        """Return the names in a folder, sorted, those of folders with ``/`` at the end; empty if it is absent."""
        base = self.path(location)
        with _translated(str(location)):
            if not base.is_dir():
                return []
            with os.scandir(base) as entries:
                return sorted(e.name + "/" * e.is_dir() for e in entries if not e.name.endswith(_TEMPORARY))

    def read(self, location: Location, start: int, length: int | None, known: ObjectInfo | None) -> bytes:
        """Return ``length`` bytes from ``start`` (fewer at the end of the file)."""
        with _translated(str(location)), self.path(location).open("rb") as file:
            _check(file, str(location), known.etag or None if known else None)
            file.seek(start)
            return file.read(length)

    def stream(self, location: Location, info: ObjectInfo, start: int) -> Iterator[bytes]:
        """Yield the file's bytes from ``start``; ObjectChangedError if it is not the listed one to the end."""
        with _translated(info.uri), self.path(location).open("rb") as file:
            _check(file, info.uri, info.etag or None)
            file.seek(start)
            left = info.size - start
            while left > 0:
                block = file.read(min(_BLOCK, left))
                if not block:
                    break
                left -= len(block)
                yield block
            # An appended or rewritten file has another etag; a truncated one ends early.
            _check(file, info.uri, info.etag or None)
            if left > 0:
                raise ObjectChangedError(f"{info.uri}: became shorter while it was being read")

    def write(self, location: Location, data: bytes) -> None:
        """Replace the file's content in one step: readers see the old content or the new."""
        with _translated(str(location)), replacing(self.path(location)) as file:
            file.write(data)

    def write_blocks(self, location: Location, blocks: Iterable[bytes | memoryview], size: int) -> None:
        """Write a file as its blocks arrive. It appears when it is complete."""
        path = self.path(location)
        with _translated(str(location)):
            path.parent.mkdir(parents=True, exist_ok=True)
            check_space(path.parent, size, str(location))
            with replacing(path) as file:
                for block in blocks:
                    file.write(block)

    def put_file(self, source: Path, location: Location) -> None:
        """Copy a file to the location, which appears when it is complete."""
        target = self.path(location)
        with _translated(str(location)):
            if target.exists() and target.samefile(source):
                return
            check_space(target.parent, source.stat().st_size, str(location))
            with source.open("rb") as reader, replacing(target) as writer:
                shutil.copyfileobj(reader, writer, 4 * MIB)

    def delete(self, location: Location) -> None:
        """Remove a file; no error if there is none."""
        with _translated(str(location)):
            self.path(location).unlink(missing_ok=True)

    def delete_tree(self, location: Location) -> None:
        """Remove a folder and all below it; no error if there is none."""
        path = self.path(location)
        with _translated(str(location)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)


def relative_files(folder: Path) -> list[str]:
    """Return the relative paths of the files below a folder, sorted."""
    with _translated(str(folder)):
        return list(_walk(folder))


def _walk(base: Path, inside: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the relative paths of the files below ``base`` in their sorted order, reading folder by folder.

    Symbolic links are followed, except to a folder that is being walked already.
    """
    identity = base.stat()
    if (identity.st_dev, identity.st_ino) in above:
        return
    above = (*above, (identity.st_dev, identity.st_ino))
    with os.scandir(base) as entries:
        # With its "/", a folder sorts as the paths of its files do: "a-b" before "a/b".
        names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    for name in names:
        if name.endswith("/"):
            yield from _walk(base / name, inside + name, above)
        elif not name.endswith(_TEMPORARY):
            yield inside + name


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"


def _check(file: IO[bytes], uri: str, etag: str | None) -> None:
    if etag is not None and _etag(os.fstat(file.fileno())) != etag:
        raise ObjectChangedError(f"{uri}: changed while it was being read; stop writing to it, or give the run a copy")


@contextlib.contextmanager
def _translated(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, uri) from error


def check_space(folder: Path, needed: int, subject: str) -> None:
    """Raise NoSpaceError unless the file system that holds ``folder`` has ``needed`` bytes and 1 % of them to spare."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + needed // 100:
        wanted, there = sizes(needed + needed // 100, free)
        raise NoSpaceError(
            f"{subject}: {folder} needs {wanted} but has {there} free; make room or choose another folder"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path``; at the end it is synced to disk and renamed to ``path``.

    On an error the temporary file is removed and ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name, so that two writers of one path cannot mix their bytes; the last rename wins whole.
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    # Some network file systems refuse to sync a folder; the rename itself has happened.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
