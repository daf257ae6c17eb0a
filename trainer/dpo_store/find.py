"""From an address with a wildcard, a folder or one name to the objects it stands for, or to the nearest name."""

from __future__ import annotations

import difflib
import re
from itertools import islice
from typing import TYPE_CHECKING, Final

from dpo_api.errors import DPOError, NotFoundError
from dpo_store import uris
from dpo_store.errors import BadCredentialsError
from dpo_store.hub import HubBackend
from dpo_store.local import LocalBackend
from dpo_store.options import ObjectInfo
from dpo_store.uris import Location

if TYPE_CHECKING:
    from dpo_store.s3 import S3Backend

type Backend = LocalBackend | HubBackend | S3Backend
"""What a store reads from, by the kind of address."""

_COUNTED: Final = 1000
"""Objects are counted up to here for a suggestion."""
_WILDCARD: Final = re.compile(r"[*?]")


def expand(backend: Backend, location: Location) -> list[ObjectInfo]:
    """See Store.expand."""
    first = _WILDCARD.search(location.path)
    single = first is None and location.path != "" and not location.path.endswith("/")
    try:
        if first is not None:
            found = _matching(backend, location, first.start())
        else:
            found = [backend.stat(location)] if single else list(backend.list(location))
    except NotFoundError as error:
        raise _not_found(backend, location, error) from error
    if found:
        return found
    raise _no_match(backend, location, first.start()) if first is not None else _not_found(backend, location)


def _pattern(path: str) -> re.Pattern[str]:
    """Compile a path with ``*``, ``**`` and ``?``; ``**/`` also stands for nothing, as in a shell's globstar."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", path)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts), re.DOTALL)


def _base(path: str, first: int) -> str:
    """Return the folder that contains the first wildcard."""
    return path[: path.rfind("/", 0, first) + 1]


def _matching(backend: Backend, location: Location, first: int) -> list[ObjectInfo]:
    path = location.path
    # S3 lists by prefix, which may end inside a name; files only by folder.
    start = _base(path, first) if isinstance(backend, LocalBackend) else path[:first]
    pattern = _pattern(path)
    return [info for info in backend.list(location.at(start)) if pattern.fullmatch(uris.parse(info.uri).path)]


def _no_match(backend: Backend, location: Location, first: int) -> DPOError:
    base = location.at(_base(location.path, first))
    below = list(islice(backend.list(base), _COUNTED + 1))
    if not below:
        return _not_found(backend, location)
    pattern, example = location.path[len(base.path) :], uris.parse(below[0].uri).path[len(base.path) :]
    return NotFoundError(
        f"{location}: no object matches {pattern!r}; {base} holds {_count(len(below))}, the first is {example!r}"
    )


def _not_found(backend: Backend, location: Location, cause: NotFoundError | None = None) -> DPOError:
    """Say what is missing and name the nearest thing that exists."""
    problem = "nothing found" if cause is None else "does not exist"
    try:
        near = _nearest(backend, location)
        if cause is not None and not location.path:
            raise cause  # a root that does not exist
    except BadCredentialsError as error:  # some servers answer "not found" to a HEAD by an unknown user
        return error
    except NotFoundError as error:  # not even the bucket or the claim is there
        if isinstance(backend, LocalBackend | HubBackend):
            return cause or error
        return NotFoundError(f"{location}: bucket {location.root!r} does not exist{_nearest_bucket(backend, location)}")
    except DPOError:  # the search for a hint must not hide what was missing
        near = ""
    return NotFoundError(f"{location}: {problem}{near}")


def _nearest(backend: Backend, location: Location) -> str:
    """Walk up to the nearest folder that holds something, and compare its names with the one that was asked for."""
    wildcard = _WILDCARD.search(location.path)
    path = (location.path if wildcard is None else _base(location.path, wildcard.start())).rstrip("/")
    while path:
        parent, _, name = path.rpartition("/")
        base = parent + "/" if parent or location.path.startswith("/") else ""
        names = backend.children(location.at(base if base or location.scheme in uris.REMOTE else "./"))
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


def _suggestion(backend: Backend, location: Location) -> str:
    if not location.path.endswith("/"):
        return f"; did you mean {location}?"
    count = sum(1 for _ in islice(backend.list(location), _COUNTED + 1))
    return f"; did you mean {location} ({_count(count)})?"


def _count(count: int) -> str:
    if count > _COUNTED:
        return f"more than {_COUNTED} objects"
    return "1 object" if count == 1 else f"{count} objects"


def _nearest_bucket(backend: Backend, location: Location) -> str:
    if isinstance(backend, LocalBackend | HubBackend):
        return ""
    try:
        names = backend.buckets()
    except DPOError:  # many credentials may not list buckets
        return ""
    close = difflib.get_close_matches(location.root, names, n=1, cutoff=0.6)
    return f"; did you mean s3://{close[0]}/?" if close else ""
