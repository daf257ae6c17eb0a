"""A small server that speaks the few calls of the Hugging Face Hub that reading a repository takes.

It is no copy of the hub: it knows commits, branches, files with ranges, one token, and answers that break off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

_KINDS = {"models": "", "datasets": "datasets/"}


@dataclass
class HubServer:
    """A running server. ``token``: what requests must carry; None: nothing. ``seen``: (method, path, range) of each."""

    endpoint: str = ""
    token: str | None = None
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    announced: dict[str, int] = field(default_factory=dict)
    """Sizes that a repository's list gives for paths, whatever their files hold."""
    cuts: list[int] = field(default_factory=list)
    """After how many bytes each of the next files breaks off."""

    def push(self, repository: str, files: Path | Mapping[str, bytes], branch: str = "main") -> str:
        """Make a commit of a folder's files, or of some contents, and move the branch to it; return its name.

        ``repository``: ``org/name``, or ``datasets/org/name``.
        """
        if isinstance(files, Path):
            found = {
                str(path.relative_to(files)): path.read_bytes() for path in sorted(files.rglob("*")) if path.is_file()
            }
        else:
            found = dict(files)
        commit = hashlib.sha1(repr(sorted(found.items())).encode()).hexdigest()  # noqa: S324 - a name, as Git's
        self.commits[repository, commit] = found
        self.branches[repository, branch] = commit
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """Return what huggingface_hub reads to reach this server, and nothing of this machine's configuration."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
        }  # fmt: skip

    def downloads(self, name: str) -> list[str]:
        """Return the ranges of the requests for a file's content."""
        return [ranges for method, path, ranges in self.seen if method == "GET" and path.endswith("/" + name)]


@contextlib.contextmanager
def hub_server(token: str | None = None) -> Iterator[HubServer]:
    """Run a server until the block ends."""
    hub = HubServer(token=token)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Say nothing."""

    def _handle(self) -> None:
        hub, path = self.state, unquote(self.path.partition("?")[0])
        hub.seen.append((self.command, path, self.headers.get("Range", "")))
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if hub.token is not None and given != hub.token:
            if given:
                self._refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            else:
                self._refuse(401, {"X-Error-Code": "RepoNotFound"})
            return
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self._describe(_KINDS[found[1]] + found[2], found[3], found[4])
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(found[1], found[2], found[3])
        else:
            self._refuse(404, {})

    do_GET = do_HEAD = _handle  # noqa: N815 (the base class's names)

    def _commit(self, repository: str, revision: str) -> str | None:
        """Return a revision's commit, having answered if there is none."""
        hub = self.state
        commit = hub.branches.get((repository, revision), revision)
        if (repository, commit) in hub.commits:
            return commit
        known = any(name == repository for name, _ in hub.commits)
        self._refuse(404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        return None

    def _describe(self, repository: str, what: str, revision: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        answer: object = {"id": repository.removeprefix("datasets/"), "sha": commit, "siblings": []}
        if what == "tree":
            files = self.state.commits[repository, commit]
            answer = [
                {
                    "type": "file",
                    "path": path,
                    "size": self.state.announced.get(path, len(data)),
                    "oid": _name(data),
                }
                for path, data in files.items()
            ]
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repository: str, revision: str, path: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        data = self.state.commits[repository, commit].get(path)
        if data is None:
            self._refuse(404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{_name(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(200, data, headers)
            return
        first, last = int(asked[1]), int(asked[2]) if asked[2] else len(data) - 1
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], headers)

    def _refuse(self, code: int, headers: Mapping[str, str]) -> None:
        self._answer(code, b"{}", {"Content-Type": "application/json", **headers})

    def _answer(self, code: int, data: bytes, headers: Mapping[str, str]) -> None:
        cuts = self.state.cuts
        cut = cuts.pop(0) if cuts and "ETag" in headers and self.command == "GET" else None
        self.send_response_only(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[:cut])
        self.close_connection = self.close_connection or cut is not None


def _name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
