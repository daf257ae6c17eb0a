"""A small server of our own that speaks the few calls of the Hugging Face Hub that reading and pushing a model take.

It is no copy of the hub: it knows commits, branches, files with ranges, one token with what it may write to, and
answers that break off. A push is huggingface_hub's without Xet: create a repository or branch, ask how each file is
sent, send large ones by Git LFS (whole or in parts), and commit.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

_KINDS = {"models": "", "datasets": "datasets/"}
LFS_BYTES = 4096
"""Files from this size on, and those named *.safetensors, are sent by Git LFS."""


@dataclass
class Failure:
    """What happens to the next ``times`` requests whose "METHOD path" matches ``pattern``, after ``skip`` that pass.

    code: the status of the answer; 0: the connection closes without one. acts: whether the server does what was asked
    before that. until: there is no answer, and the connection stays open until this event.
    """

    pattern: str
    code: int
    times: int = 1
    skip: int = 0
    acts: bool = False
    until: threading.Event | None = None


@dataclass
class HubServer:
    """A running server. ``token``: what requests must carry; None: nothing. ``seen``: (method, path, range) of each."""

    endpoint: str = ""
    token: str | None = None
    role: str = "write"
    """What the token may do, as the hub names it: read or write."""
    writable: set[str] = field(default_factory=lambda: {"org"})
    """The organisations whose repositories the token may create and write to."""
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    """The first line of each commit that was pushed to the server."""
    private: dict[str, bool] = field(default_factory=dict)
    """Of each repository that was created."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was sent by Git LFS, by its SHA-256."""
    part_bytes: int | None = None
    """Size of the parts that a file is sent in; None: it is sent whole."""
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    announced: dict[str, int] = field(default_factory=dict)
    """Sizes that a repository's list gives for paths, whatever their files hold."""
    cuts: list[int] = field(default_factory=list)
    """After how many bytes each of the next files breaks off."""
    failures: list[Failure] = field(default_factory=list)
    heard: Callable[[str], None] = lambda _: None
    """Called with "METHOD path" of each request before it is answered."""

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
        name = repr((self.branches.get((repository, branch)), sorted(found.items())))
        commit = hashlib.sha1(name.encode()).hexdigest()  # noqa: S324 - a name, as Git's
        self.commits[repository, commit] = found
        self.branches[repository, branch] = commit
        return commit

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """Return what a branch holds."""
        return self.commits[repository, self.branches[repository, branch]]

    def knows(self, repository: str) -> bool:
        """Say whether there is such a repository."""
        return any(name == repository for name, _ in self.commits)

    def environment(self, home: Path) -> dict[str, str]:
        """Return what huggingface_hub reads to reach this server, and nothing of this machine's configuration."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
        }  # fmt: skip

    def downloads(self, name: str) -> list[str]:
        """Return the ranges of the requests for a file's content."""
        return [ranges for method, path, ranges in self.seen if method == "GET" and path.endswith("/" + name)]

    def uploads(self) -> list[str]:
        """Return the SHA-256 of each file, or of each file of a part, that was sent by Git LFS, in their order."""
        return [path.split("/")[2] for method, path, _ in self.seen if method == "PUT" and path.startswith("/lfs/")]


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


def used_here(hub: HubServer, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub of this process use the server, and wait for nothing between its own tries.

    folder: for its files, among them ``token``, as `hf auth login` writes it.
    """
    from huggingface_hub import constants

    # Read from the environment when huggingface_hub is imported.
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, value in hub.environment(folder / "home").items():
        patch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@contextlib.contextmanager
def signed_in(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Run a server with a token, which huggingface_hub of this process has. folder: see ``used_here``."""
    with hub_server(token="hf_right") as running:
        used_here(running, folder, patch)
        patch.setenv("HF_TOKEN", "hf_right")
        yield running


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer's body waits 40 ms for its head
    state: HubServer
    _failure: Failure | None = None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Say nothing."""

    def _handle(self) -> None:
        hub, path = self.state, unquote(self.path.partition("?")[0])
        hub.seen.append((self.command, path, self.headers.get("Range", "")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.heard(f"{self.command} {path}")
        self._failure = self._failing(f"{self.command} {path}")
        if self._failure is not None and self._failure.until is not None:
            self._failure.until.wait()
            self.close_connection = True  # nobody waits for the answer any more
            return
        if self._failure is not None and not self._failure.acts:
            self._answer(200, b"", {})  # which the failure replaces
            return
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        signed = path.startswith("/lfs/")  # as the hub's, such addresses need no token
        if hub.token is not None and given != hub.token and not signed:
            if given:
                self._refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            else:
                self._refuse(401, {"X-Error-Code": "RepoNotFound"})
            return
        for pattern, act in _CALLS:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                act(self, *found.groups())
                return
        self._refuse(404, {})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 (the base class's names)

    def _failing(self, request: str) -> Failure | None:
        for failure in self.state.failures:
            if re.search(failure.pattern, request) is None or failure.times == 0:
                continue
            if failure.skip:
                failure.skip -= 1
                continue
            failure.times -= 1
            return failure
        return None

    def _commit(self, repository: str, revision: str) -> str | None:
        """Return a revision's commit, having answered if there is none."""
        hub = self.state
        commit = hub.branches.get((repository, revision), revision)
        if (repository, commit) in hub.commits:
            return commit
        self._refuse(404, {"X-Error-Code": "RevisionNotFound" if hub.knows(repository) else "RepoNotFound"})
        return None

    # -- reading

    def _describe(self, kind: str, name: str, what: str, revision: str) -> None:
        repository = _KINDS[kind] + name
        commit = self._commit(repository, revision)
        if commit is None:
            return
        answer: object = {"id": name, "sha": commit, "siblings": []}
        if what == "tree":
            files = self.state.commits[repository, commit]
            answer = [self._entry(path, data) for path, data in files.items()]
        self._say(answer)

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        size = self.state.announced.get(path, len(data))
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": _git_name(data)}
        if _by_lfs(path, len(data)):
            entry["lfs"] = {"oid": _name(data), "size": size, "pointerSize": 130}
        return entry

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

    # -- pushing

    def _may_write(self, repository: str) -> bool:
        """Return whether the token may write to a repository, having answered if not."""
        if self.state.role != "read" and repository.partition("/")[0] in self.state.writable:
            return True
        self._refuse(403, {"X-Error-Message": "you have no write access"})
        return False

    def _who(self) -> None:
        orgs = [{"name": name, "roleInOrg": "write"} for name in sorted(self.state.writable)]
        role = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.state.role}}
        self._say({"type": "user", "name": "tester", "orgs": orgs, "auth": role})

    def _check(self, repository: str, write: str | None) -> None:
        if not self.state.knows(repository):
            self._refuse(404, {"X-Error-Code": "RepoNotFound"})
        elif write is None or self._may_write(repository):
            self._say({})

    def _create(self) -> None:
        asked = json.loads(self.body)
        repository = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(repository):
            return
        if self.state.knows(repository):
            self._refuse(409, {})
            return
        self.state.private[repository] = asked.get("visibility") == "private"
        self.state.push(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._say({"url": f"{self.state.endpoint}/{repository}", "name": repository})

    def _branch(self, repository: str, branch: str) -> None:
        if not self._may_write(repository):
            return
        if (repository, branch) in self.state.branches:
            self._refuse(409, {})
            return
        self.state.branches[repository, branch] = self.state.branches[repository, "main"]
        self._say({})

    def _preupload(self, repository: str, revision: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None or not self._may_write(repository):
            return
        there, answer = self.state.commits[repository, commit], []
        for each in json.loads(self.body)["files"]:
            lfs, known = _by_lfs(each["path"], each["size"]), there.get(each["path"])
            oid = {} if known is None else {"oid": _name(known) if lfs else _git_name(known)}
            ignored = each["path"] in there.get(".gitignore", b"").decode().splitlines()
            answer.append(
                {"path": each["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignored, **oid}
            )
        self._say({"files": answer})

    def _batch(self, repository: str) -> None:
        if not self._may_write(repository):
            return
        self._say(
            {
                "transfer": "basic" if self.state.part_bytes is None else "multipart",
                "objects": [self._action(each["oid"], each["size"]) for each in json.loads(self.body)["objects"]],
            }
        )

    def _action(self, oid: str, size: int) -> dict[str, Any]:
        """Return how an object is to be sent: not at all if it is here."""
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid in self.state.objects:
            return answer
        where, step = f"{self.state.endpoint}/lfs/{oid}", self.state.part_bytes
        upload: dict[str, Any] = {"href": where}
        if step is not None:
            places = {str(number + 1): f"{where}/{number + 1}" for number in range(-(-size // step))}
            upload["header"] = {"chunk_size": str(step), **places}
        return {**answer, "actions": {"upload": upload, "verify": {"href": f"{where}/verify"}}}

    def _take(self, oid: str, part: str | None) -> None:
        if part is not None:
            self.state.parts[oid, int(part)] = self.body
        elif _name(self.body) == oid:
            self.state.objects[oid] = self.body
        else:
            self._refuse(400, {})
            return
        self._answer(200, b"", {"etag": f'"{_name(self.body)}"'})

    def _join(self, oid: str) -> None:
        data = b"".join(self.state.parts[oid, each["partNumber"]] for each in json.loads(self.body)["parts"])
        if _name(data) == oid:
            self.state.objects[oid] = data
            self._say({})
        else:
            self._refuse(400, {})

    def _verify(self, oid: str) -> None:
        if oid in self.state.objects:
            self._say({})
        else:
            self._refuse(404, {})

    def _take_commit(self, repository: str, branch: str) -> None:
        commit = self._commit(repository, branch)
        if commit is None or not self._may_write(repository):
            return
        files = dict(self.state.commits[repository, commit])
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                if value.get("parentCommit", commit) != commit:
                    self._refuse(412, {"X-Error-Message": "A commit has happened since"})
                    return
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            else:
                del files[value["path"]]
        self.state.titles.append(title)
        new = self.state.push(repository, files, branch)
        self._say({"commitOid": new, "commitUrl": f"{self.state.endpoint}/{repository}/commit/{new}"})

    # -- answers

    def _say(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: int, headers: Mapping[str, str]) -> None:
        self._answer(code, b"{}", {"Content-Type": "application/json", **headers})

    def _answer(self, code: int, data: bytes, headers: Mapping[str, str]) -> None:
        failure = self._failure
        if failure is not None:
            code, data, headers = failure.code, b"{}", {"Content-Type": "application/json"}
            if not code:
                self.close_connection = True
                return
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


_REPOSITORY = r"([^/]+/[^/]+)"
_CALLS: list[tuple[str, Callable[..., None]]] = [
    (rf"(?:GET|HEAD) /api/(models|datasets)/{_REPOSITORY}/(revision|tree)/([^/]+)", _Handler._describe),
    (r"(?:GET|HEAD) /((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler._send_file),
    (r"GET /api/whoami-v2", _Handler._who),
    (rf"GET /api/models/{_REPOSITORY}/auth-check(/write)?", _Handler._check),
    (r"POST /api/repos/create", _Handler._create),
    (rf"POST /api/models/{_REPOSITORY}/branch/([^/]+)", _Handler._branch),
    (r"POST /api/validate-yaml", lambda handler: handler._say({})),
    (rf"POST /api/models/{_REPOSITORY}/preupload/([^/]+)", _Handler._preupload),
    (rf"POST /{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /lfs/([0-9a-f]{64})(?:/(\d+))?", _Handler._take),
    (r"POST /lfs/([0-9a-f]{64})", _Handler._join),
    (r"POST /lfs/([0-9a-f]{64})/verify", _Handler._verify),
    (rf"POST /api/models/{_REPOSITORY}/commit/([^/]+)", _Handler._take_commit),
]
"""What "METHOD path" looks like, and what answers it."""


def _by_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LFS_BYTES


def _name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - Git's own name of it
