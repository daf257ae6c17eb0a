"""Repositories of the Hugging Face Hub, through huggingface_hub: ``hf://org/name@revision/path``, to read.

``push`` writes to them; as addresses of a store they are for reading only.

A branch or tag is resolved to its commit once for each store, so that all reads see one version. With a cache folder,
files are downloaded whole into it, as huggingface_hub lays them out, and read there; without one, each read is a
request for its range, which suits a client that looks at a few headers. The token is huggingface_hub's own choice:
``HF_TOKEN``, or the file that ``hf auth login`` writes; ``HF_ENDPOINT`` names another server.
"""

from __future__ import annotations

import builtins  # `list` is a method here
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from dpo_api.errors import AccessDeniedError, InvalidSpecError, NotFoundError, StorageUnavailableError, UsageError
from dpo_store import retry
from dpo_store.errors import ERRNOS, Rule
from dpo_store.local import LocalBackend, check_space
from dpo_store.options import MIB, ObjectInfo, RetryPolicy, Timing
from dpo_store.uris import Location

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class HubMissingError(UsageError):
    """huggingface_hub is not installed here."""


SILENCE_SECONDS: Final = 300.0
"""Longest wait for a connection, or between two bytes. The hub's answer to a large commit takes minutes."""
_CHUNK: Final = 8 * MIB
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DATASETS: Final = "datasets/"

_BUSY: Final = Rule(StorageUnavailableError, retry=True, text="the hub is overloaded or failing")
LOST: Final = Rule(StorageUnavailableError, retry=True, text="the hub cannot be reached, or broke the connection")
_REFUSED: Final = Rule(AccessDeniedError, retry=False, text="the hub refuses the token; check HF_TOKEN")
_BY_NAME: Final[dict[str, Rule]] = {
    # In this order: a later one is a base class of an earlier one.
    "LocalEntryNotFoundError": LOST,
    "GatedRepoError": Rule(
        AccessDeniedError,
        retry=False,
        text="the repository is gated; accept its terms on its page, and set HF_TOKEN to a token of that account",
    ),
    "RevisionNotFoundError": Rule(NotFoundError, retry=False, text="the repository has no such revision"),
    "EntryNotFoundError": Rule(NotFoundError, retry=False, text="does not exist"),
    "RepositoryNotFoundError": Rule(
        NotFoundError, retry=False, text="no such repository, or it is private and HF_TOKEN may not read it"
    ),
    "OfflineModeIsEnabled": Rule(
        StorageUnavailableError, retry=False, text="HF_HUB_OFFLINE is set, and the cache does not hold it"
    ),
    "JSONDecodeError": _BUSY,
    "XetAuthenticationError": _REFUSED,
    "HFValidationError": Rule(InvalidSpecError, retry=False, text="write hf://org/name@revision"),
}


def explain(error: BaseException) -> tuple[Rule, str] | None:
    """Return what an exception of huggingface_hub or of its HTTP client means; None if it is not about the hub."""
    names = [cls.__name__ for cls in type(error).__mro__]
    rule = next((rule for name, rule in _BY_NAME.items() if name in names), None)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if rule is None and isinstance(status, int):
        rule = _REFUSED if status in (401, 403) else _BUSY
        if rule is _BUSY:
            return rule, f"{rule.text} (HTTP {status})"
    if rule is None and isinstance(error, OSError) and error.errno is not None:
        rule = ERRNOS.get(error.errno)
    # The HTTP client's own errors, and a file whose length is not the announced one.
    if rule is None and (isinstance(error, OSError) or type(error).__module__.partition(".")[0].startswith("http")):
        rule = LOST
    return None if rule is None else (rule, rule.text)


def api() -> HfApi:
    """Return huggingface_hub's client. Raises HubMissingError if it is not installed here."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise HubMissingError("hf:// addresses need huggingface_hub: pip install huggingface_hub") from error
    disable_progress_bars()
    _limit_waits()
    return HfApi(endpoint=_endpoint())


@functools.cache
def _limit_waits() -> None:
    """Let no request of this process wait for ever, as those of huggingface_hub do."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        made = default_client_factory()
        made.timeout = SILENCE_SECONDS
        return made

    set_client_factory(client)


class HubBackend:
    """The operations of a Store on the hub. Safe for threads."""

    def __init__(self, policy: RetryPolicy, timing: Timing, cache: str | None) -> None:
        self._policy = policy
        self._timing = timing
        self._cache = cache
        self._lock = threading.Lock()
        self._commits: dict[str, str] = {}
        self._trees: dict[str, dict[str, ObjectInfo]] = {}
        self._local = LocalBackend()

    def _run[T](self, subject: str, attempt: Callable[[], T]) -> T:
        return retry.Patience(subject, self._policy, self._timing, explain).run(attempt)

    def commit(self, location: Location) -> str:
        """Return the commit that the location's revision is; ``main`` if it names none."""
        repository, kind, revision = _parts(location)
        if _COMMIT.fullmatch(revision):
            return revision
        with self._lock:
            found = self._commits.get(location.root)
        if found is None:
            client = api()
            subject = f"hf://{location.root}"
            info = self._run(subject, lambda: client.repo_info(repository, repo_type=kind, revision=revision))
            if info.sha is None:
                raise StorageUnavailableError(f"{subject}: the hub names no commit")
            found = info.sha
            with self._lock:
                found = self._commits.setdefault(location.root, found)
        return found

    def _tree(self, location: Location) -> dict[str, ObjectInfo]:
        """Return the repository's files by path, in their order."""
        with self._lock:
            found = self._trees.get(location.root)
        if found is None:
            commit, client, (repository, kind, _) = self.commit(location), api(), _parts(location)

            def attempt() -> list[Any]:
                return list(client.list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind))

            entries = self._run(f"hf://{location.root}", attempt)
            files = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}  # not folders
            found = {
                path: ObjectInfo(str(location.at(path)), files[path].size, files[path].blob_id)
                for path in sorted(files)
            }
            with self._lock:
                self._trees[location.root] = found
        return found

    def stat(self, location: Location) -> ObjectInfo:
        """Describe one file."""
        found = self._tree(location).get(location.path)
        if found is None:
            raise NotFoundError(f"{location}: does not exist")
        return found

    def list(self, location: Location) -> Iterator[ObjectInfo]:
        """Describe every file whose path starts with the location's, in the paths' order."""
        return (info for path, info in self._tree(location).items() if path.startswith(location.path))

    def children(self, location: Location) -> builtins.list[str]:
        """Return the names in a folder, sorted, those of folders with ``/`` at the end."""
        rests = [path[len(location.path) :] for path in self._tree(location) if path.startswith(location.path)]
        return sorted({first + slash for first, slash, _ in (rest.partition("/") for rest in rests)} - {""})

    def _file(self, location: Location, cache: str, info: ObjectInfo) -> Location:
        """Return the cached copy of a file, downloading it first unless it is there.

        Raises NoSpaceError before the first byte if the cache's file system is too full.
        """
        api()
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        repository, kind, _ = _parts(location)
        commit = self.commit(location)
        found = try_to_load_from_cache(repository, location.path, cache_dir=cache, revision=commit, repo_type=kind)
        if isinstance(found, str):
            return Location("path", "", found)
        check_space(Path(cache), info.size, str(location))

        def attempt() -> str:
            return hf_hub_download(
                repository, location.path, repo_type=kind, revision=commit, cache_dir=cache, endpoint=_endpoint()
            )

        return Location("path", "", self._run(str(location), attempt))

    def read(self, location: Location, start: int, length: int | None, known: ObjectInfo | None) -> bytes:
        """Return ``length`` bytes from ``start`` (fewer at the end of the file)."""
        info = known or self.stat(location)
        stop = info.size if length is None else min(info.size, start + length)
        if start >= stop:
            return b""
        if self._cache is not None:
            return self._local.read(self._file(location, self._cache, info), start, stop - start, None)
        return self._run(str(location), lambda: self._range(location, start, stop))

    def _range(self, location: Location, start: int, stop: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        repository, kind, _ = _parts(location)
        api()
        commit = self.commit(location)
        url = hf_hub_url(repository, location.path, repo_type=kind, revision=commit, endpoint=_endpoint())
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=self._policy.read_timeout
        ) as answer:
            hf_raise_for_status(answer)
            if answer.status_code != 206 and int(answer.headers.get("Content-Length", -1)) != stop - start:
                raise StorageUnavailableError(f"{location}: the hub does not answer range requests")
            data = answer.read()
        if len(data) != stop - start:
            raise retry.PassingError(f"asked for {stop - start} bytes, the hub sent {len(data)}")
        return bytes(data)

    def stream(self, location: Location, info: ObjectInfo, start: int) -> Iterator[bytes]:
        """Yield the file's bytes from ``start``."""
        if self._cache is None:
            for at in range(start, info.size, _CHUNK):
                yield self.read(location, at, _CHUNK, info)
            return
        copy = self._file(location, self._cache, info)
        yield from self._local.stream(copy, self._local.stat(copy), start)

    # Nothing is written to the hub.

    def write(self, location: Location, *_: object) -> None:
        """Refuse."""
        _refuse(location)

    write_blocks = delete = write

    def put_file(self, _: Path, location: Location) -> None:
        """Refuse."""
        _refuse(location)

    def keys_below(self, location: Location) -> Iterator[str]:
        """Refuse: they are asked for to delete them."""
        _refuse(location)


def _endpoint() -> str | None:
    """Return the server that the environment names: huggingface_hub itself reads that only when it is imported."""
    return os.environ.get("HF_ENDPOINT")


def _parts(location: Location) -> tuple[str, str, str]:
    """Return repository, its kind and its revision."""
    kind = "dataset" if location.root.startswith(_DATASETS) else "model"
    repository, _, revision = location.root.removeprefix(_DATASETS).partition("@")
    return repository, kind, revision or "main"


def _refuse(location: Location) -> NoReturn:
    raise InvalidSpecError(f"{location}: hf:// can only be read; write to s3://, pvc:// or a path")
