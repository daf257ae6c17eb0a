"""Whole files and folders between this machine and a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from dpo_api.errors import InvalidDataError, NotFoundError
from dpo_store import uris
from dpo_store.errors import from_os_error
from dpo_store.local import LocalBackend, check_space, relative_files, replacing
from dpo_store.options import ObjectInfo
from dpo_store.uris import Location

if TYPE_CHECKING:
    from dpo_store.find import Backend

_TOGETHER: Final = 4
"""Files under way at once: up to 4 * 32 MiB of parts going up, 4 * 16 MiB that were read ahead coming down."""


def download(blocks: Iterator[bytes], info: ObjectInfo, path: Path) -> None:
    """Write an object's bytes to a file that appears when it is complete."""
    try:
        check_space(path.parent, info.size, info.uri)
        with replacing(path) as file:
            for block in blocks:
                file.write(block)
    except OSError as error:
        raise from_os_error(error, str(path)) from error


def upload_tree(upload: Callable[[Path, str], None], folder: Path, uri: str) -> list[str]:
    """See Store.upload_tree; ``upload`` copies one file to an address."""
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: is not a folder")
    names = relative_files(folder)
    _in_threads(lambda name: upload(folder / name, uris.join_uri(uri, name)), names)
    return names


def download_tree(
    objects: Iterable[ObjectInfo], prefix: str, download: Callable[[ObjectInfo, Path], None], folder: Path
) -> list[str]:
    """See Store.download_tree. ``objects`` are those below ``prefix``; ``download`` copies one of them to a file."""
    found = {_safe_name(info.uri, prefix): info for info in objects}
    try:
        check_space(folder, sum(info.size for info in found.values()), prefix)
    except OSError as error:
        raise from_os_error(error, str(folder)) from error
    _in_threads(lambda name: download(found[name], folder / name), found)
    return sorted(found)


def delete_tree(backend: Backend, location: Location) -> None:
    """See Store.delete_tree."""
    if isinstance(backend, LocalBackend):
        backend.delete_tree(location)
    else:
        # One request an object: the batch request needs checksums that S3-compatible servers disagree about.
        _in_threads(backend.delete, [uris.parse(uri) for uri in backend.keys_below(location)])


def _safe_name(uri: str, prefix: str) -> str:
    """Return an object's path below the prefix. Keys are free text: none may lead out of the folder."""
    name = uri[len(prefix) :]
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name or "//" in name:
        raise InvalidDataError(f"{uri}: this key cannot be a file's name below a folder")
    return name


def _in_threads[T](work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do the work for every item; at the first error start no more and raise it."""
    with ThreadPoolExecutor(max_workers=_TOGETHER, thread_name_prefix="dpo-store") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
