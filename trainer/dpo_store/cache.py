"""The cache folder of a node: its path, its free space and its lock."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_api.errors import NoSpaceError
from dpo_api.texts import sizes
from dpo_store.errors import from_os_error


def cache_folder() -> Path:
    """Return ``$DPO_CACHE_DIR``, else ``~/.cache/dpo-operator``; it contains index/<key>/, reference/ and archives/."""
    return Path(os.environ.get("DPO_CACHE_DIR") or "~/.cache/dpo-operator").expanduser()


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold ``lock`` exclusively on this node; the kernel releases it if the process dies."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise from_os_error(error, f"{lock.parent} (the cache; DPO_CACHE_DIR moves it)") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_bytes(folder: Path) -> int:
    """Return the bytes that can still be written below ``folder``, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def no_space(folder: Path, what: str, needed: int, available: int) -> NoSpaceError:
    """Return the error that names the folder, what is written to it, and both sizes."""
    wanted, free = sizes(needed, available)
    return NoSpaceError(
        f"{folder}: {what} needs about {wanted} and only {free} are free;"
        " free some, or set DPO_CACHE_DIR to a larger disk"
    )
