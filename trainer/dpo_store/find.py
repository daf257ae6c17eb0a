"""From an address with a wildcard, a folder or one name to the objects it stands for, or to the nearest name."""

from __future__ import annotations

import difflib
import re
from itertools import islice
from typing import TYPE_CHECKING, Final

from dpo_api.errors import DPOError, NotFoundError
from dpo_store import uris
from dpo_store.errors import BadCredentialsError
from dpo_store.local import LocalBackend
from dpo_store.options import ObjectInfo
from dpo_store.uris import Location

if TYPE_CHECKING:
    from dpo_store.s3 import S3Backend

_COUNTED: Final = 1000
"""Objects are counted up to here for a suggestion."""


def expand(backend: LocalBackend | S3Backend, location: Location) -> list[ObjectInfo]:
    """See Store.expand."""
    if _wildcard(location.path) is not None:
        return _matching(backend, location)
    if location.path.endswith("/") or not location.path:
        found = list(backend.list(location))
        if not found:
            raise _not_found(backend, location)
        return found
    try:
        return [backend.stat(location)]
    except NotFoundError as error:
        raise _not_found(backend, location) from error


def _wildcard(path: str) -> int | None:
    """Return the position of the first wildcard."""
    found = re.search(r"[*?]", path)
    return None if found is None else found.start()


def _pattern(path: str) -> re.Pattern[str]:
    """Compile a path with ``*``, ``**`` and ``?``; ``**/`` also stands for nothing, as in a shell's globstar."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", path)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts), re.DOTALL)


def _matching(backend: LocalBackend | S3Backend, location: Location) -> list[ObjectInfo]:
    path = location.path
    first = _wildcard(path) or 0
    base = path[: path.rfind("/", 0, first) + 1]
    # S3 lists by prefix, which may end inside a name; files only by folder.
    start = base if isinstance(backend, LocalBackend) else path[:first]
    pattern = _pattern(path)
    found = [info for info in backend.list(location.at(start)) if pattern.fullmatch(uris.parse(info.uri).path)]
    if found:
        return found
    below = list(islice(backend.list(location.at(base)), _COUNTED + 1))
    if not below:
        raise _not_found(backend, location.at(base or "/"), str(location))
    example = uris.parse(below[0].uri).path[len(base) :]
    raise NotFoundError(
        f"{location}: no object matches {path[len(base) :]!r}; {location.at(base)} holds {_count(len(below))}, "
        f"the first is {example!r}"
    )


def _not_found(backend: LocalBackend | S3Backend, location: Location, subject: str | None = None) -> DPOError:
    """Say what is missing and name the nearest thing that exists."""
    what = subject or str(location)
    kind = "nothing found" if what.endswith("/") or subject else "does not exist"
    try:
        near = _nearest(backend, location)
    except BadCredentialsError as error:  # some servers answer "not found" to a HEAD by an unknown user
        return error
    except DPOError as error:  # the search for a hint must not hide the missing object, but a missing bucket says more
        if isinstance(error, NotFoundError):
            near = _nearest_bucket(backend, location)
            return NotFoundError(f"{what}: bucket {location.root!r} does not exist{near}")
        near = ""
    return NotFoundError(f"{what}: {kind}{near}")


def _nearest(backend: LocalBackend | S3Backend, location: Location) -> str:
    """Walk up to the nearest folder that holds something, and compare its names with the one that was asked for."""
    path = location.path.rstrip("/")
    while path:
        parent, _, name = path.rpartition("/")
        base = parent + "/" if parent or location.path.startswith("/") else ""
        names = backend.children(location.at(base if base or location.scheme == "s3" else "./"))
        if name + "/" in names:  # asked for without its slash
            return _suggestion(backend, location.at(base + name + "/"))
        if name in names:  # a file that was asked for as a folder
            return f"; did you mean {location.at(base + name)}?"
        if names:
            bare = {n.rstrip("/"): n for n in names}
            close = difflib.get_close_matches(name, list(bare), n=1, cutoff=0.6)
            return _suggestion(backend, location.at(base + bare[close[0]])) if close else ""
        path = parent
    return ""


def _suggestion(backend: LocalBackend | S3Backend, location: Location) -> str:
    if not location.path.endswith("/"):
        return f"; did you mean {location}?"
    count = sum(1 for _ in islice(backend.list(location), _COUNTED + 1))
    return f"; did you mean {location} ({_count(count)})?"


def _count(count: int) -> str:
    if count > _COUNTED:
        return f"more than {_COUNTED} objects"
    return "1 object" if count == 1 else f"{count} objects"


def _nearest_bucket(backend: LocalBackend | S3Backend, location: Location) -> str:
    if isinstance(backend, LocalBackend):
        return ""
    try:
        names = backend.buckets()
    except DPOError:  # many credentials may not list buckets
        return ""
    close = difflib.get_close_matches(location.root, names, n=1, cutoff=0.6)
    return f"; did you mean s3://{close[0]}/?" if close else ""
