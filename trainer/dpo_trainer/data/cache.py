"""The cache folder of a node: where it is, room on its disk, one writer at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_api.errors import NoSpaceError
from dpo_store.errors import from_os_error


def cache_folder() -> Path:
    """``$DPO_CACHE_DIR``, else ``~/.cache/dpo-operator``; index/<key>/ and reference/ live below it."""
    return Path(os.environ.get("DPO_CACHE_DIR") or "~/.cache/dpo-operator").expanduser()


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold ``lock`` against every other process of the node; the kernel frees it when a process dies."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise from_os_error(error, f"{lock.parent} (the cache; DPO_CACHE_DIR moves it)") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written below ``folder``, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def no_space(folder: Path, what: str, needed: int, available: int) -> NoSpaceError:
    """The error that names the folder, what it should hold, and both sizes."""
    return NoSpaceError(
        f"{folder}: {what} needs about {size_text(needed)} and only {size_text(available)} are free;"
        " free some, or set DPO_CACHE_DIR to a larger disk"
    )


def size_text(count: int) -> str:
    """A size for people: 1.2 GiB."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
