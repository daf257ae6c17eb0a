"""The files of a .nemo archive or of the folder it was unpacked to, each as bytes of one object. Nothing is unpacked.

Archives come from outside. A member is read in place by its range, so none can be written anywhere; a link, a device, a
name that leaves the archive and a size that the archive does not have are refused all the same, since an archive that
has one was made to deceive.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.models.folder import Archives, Objects
from dpo_api.seekable import Seekable

MOST_MEMBERS = 100_000
"""More than a distributed checkpoint of the largest models has."""
_LARGEST_READ = 1 << 20
"""Bytes that one header of an archive may take."""
_GZIP = b"\x1f\x8b"
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, start + size) of an object."""

    object: Any
    """What ``Files.stat`` has returned."""
    start: int
    size: int

    def read(self, files: Objects, start: int = 0, length: int | None = None) -> bytes:
        """Return ``length`` bytes from ``start`` of the extent, all by default. Raises InvalidModelError if it ends."""
        length = self.size - start if length is None else length
        if start < 0 or length < 0 or start + length > self.size:
            raise InvalidModelError(
                f"{self.object.uri}: bytes {start:,} to {start + length:,} of a part of {self.size:,} bytes were asked"
                " for; copy or download it again"
            )
        data = files.read(self.object, self.start + start, length) if length else b""
        if len(data) != length:
            raise InvalidModelError(f"{self.object.uri}: it ended early while being read; copy or download it again")
        return data

    def part(self, start: int, size: int) -> Extent:
        """Return a part of it."""
        return Extent(self.object, self.start + start, size)


def members(files: Archives, uri: str) -> dict[str, Extent]:
    """Return the files of the archive or folder at ``uri`` by their name, without a leading ``./``.

    Raises NotFoundError if there is neither, InvalidModelError naming what is wrong with the archive.
    """
    try:
        found = files.stat(uri)
    except NotFoundError:
        folder = uri.rstrip("/") + "/"
        inside = {info.uri.removeprefix(folder): Extent(info, 0, info.size) for info in files.list(folder)}
        if not inside:
            raise
        return inside
    whole = Extent(found, 0, found.size)
    if whole.size >= len(_GZIP) and whole.read(files, 0, len(_GZIP)) == _GZIP:
        found = files.decompressed(found)
        whole = Extent(found, 0, found.size)
    return dict(_walk(files, whole, uri))


def _walk(files: Objects, archive: Extent, uri: str) -> Iterator[tuple[str, Extent]]:
    names: set[str] = set()
    try:
        with tarfile.open(fileobj=ExtentFile(files, archive, _LARGEST_READ), mode="r:") as tar:
            for member in tar:
                name = _name(member, uri, archive.size)
                if name is None:
                    continue
                if name in names:
                    raise InvalidModelError(f"{uri}: the archive has two members {name}; pack it again")
                if len(names) == MOST_MEMBERS:
                    raise InvalidModelError(f"{uri}: the archive has more than {MOST_MEMBERS:,} members; pack it again")
                names.add(name)
                yield name, archive.part(member.offset_data, member.size)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidModelError(f"{uri}: not a usable tar archive ({error}); copy or download it again") from None


def _name(member: tarfile.TarInfo, uri: str, size: int) -> str | None:
    """Return the name of a member that is a file, None for a folder. Raises InvalidModelError for anything else."""
    path = PurePosixPath(member.name)
    shown = repr(member.name[:200])
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise InvalidModelError(f"{uri}: member {shown} is outside of the archive; do not use this file")
    if member.size < 0 or member.offset_data + member.size > size:
        raise InvalidModelError(
            f"{uri}: member {shown} has {member.size:,} bytes, and the archive {size:,}; copy or download it again"
        )
    if member.isdir():
        return None
    if member.type not in _REGULAR or member.issparse():
        kind = _KINDS.get(member.type, "no plain file")
        raise InvalidModelError(f"{uri}: member {shown} is {kind}; only plain files are read: pack it again")
    return str(path)


class ExtentFile(Seekable, io.BufferedIOBase):
    """An extent as a file that can be read and sought. A read of more than ``limit`` bytes is a ValueError.

    Libraries ask for as many bytes as a header says, and a crafted header may say anything.
    """

    def __init__(self, files: Objects, extent: Extent, limit: int) -> None:
        super().__init__(extent.size)
        self._files, self._extent, self._limit = files, extent, limit
        self._held, self._held_from = b"", 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to ``size`` bytes; all that is left if negative."""
        size = self.given(size)
        if size > self._limit:
            raise ValueError(f"one of its headers has {size:,} bytes, at most {self._limit:,} are read")
        first = self.at - self._held_from
        if not 0 <= first <= first + size <= len(self._held):
            length = min(max(size, _AHEAD), self.given(None))
            self._held, self._held_from, first = self._extent.read(self._files, self.at, length), self.at, 0
        self.at += size
        return self._held[first : first + size]


_AHEAD = 16 * 1024
"""Bytes that are read at once, so that a few headers beside each other take one request."""
