"""A proxy before the API server that fails on purpose, and counts what passes.

A client talks plain HTTP to it on loopback; it talks TLS to the API server under an identity of its own. Faults are
put in by rules; each rule sees every request and says what becomes of it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

MUTATING = frozenset({"POST", "PUT", "PATCH", "DELETE"})


@dataclass(frozen=True)
class Call:
    """One request as it came."""

    method: str
    path: str
    query: str = ""
    body: bytes = b""
    agent: str = ""
    """The client's User-Agent."""

    @property
    def mutating(self) -> bool:
        """Whether it changes something; a dry run does not."""
        return self.method in MUTATING and "dryRun" not in self.query

    @property
    def watch(self) -> bool:
        """Whether it is a watch."""
        return "watch=true" in self.query

    @property
    def kind(self) -> str:
        """The verb and what it is about, such as ``POST pytorchjobs`` or ``PATCH dpojobs/status``."""
        parts = self.path.strip("/").split("/")
        rest = parts[parts.index("namespaces") + 2 :] if "namespaces" in parts else parts[-1:]
        return f"{self.method} {rest[0]}" + (f"/{rest[2]}" if len(rest) > 2 else "")


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of the usual."""

    status: int | None = None
    """Answer with this status; the API server never sees the request."""
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    """Of that answer."""
    before: Callable[[], None] | None = None
    """Run this instead of passing the request on, and close the connection without an answer."""
    after: Callable[[], None] | None = None
    """Pass the request on, run this, and close the connection without an answer."""


Rule = Callable[[Call], Fault | None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that are killed leave broken connections."""


class ChaosProxy:
    """A context manager. ``url`` is where clients go; ``rules`` may be changed at any time."""

    def __init__(self, upstream: str, context: ssl.SSLContext) -> None:
        """``upstream``: URL of the API server; ``context``: its CA and the proxy's client certificate."""
        parsed = urllib.parse.urlsplit(upstream)
        assert parsed.hostname is not None
        self._host, self._port = parsed.hostname, parsed.port or 443
        self._context = context
        self.rules: list[Rule] = []
        self.calls: list[Call] = []
        """Mutating calls that the API server has answered, in order."""
        self.tried: list[Call] = []
        """Mutating calls as they came, those included that were refused or failed on purpose."""
        self._watches: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.mute = threading.Event()
        """While set, watches deliver nothing although their connections are open: a hung watch."""
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        """Start serving."""
        threading.Thread(target=self._server.serve_forever, name="chaos", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.drop_watches()
        self._server.shutdown()
        self._server.server_close()

    def drop_watches(self) -> None:
        """Cut every watch that is open."""
        with self._lock:
            for connection in self._watches:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def kinds(self) -> list[str]:
        """Return the mutating calls in short form, events left out."""
        return [call.kind for call in self.calls if call.kind != "POST events"]

    def fault(self, call: Call) -> Fault | None:
        """Ask the rules."""
        for rule in list(self.rules):
            found = rule(call)
            if found is not None:
                return found
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                proxy.serve(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - the base class's names

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

        return Handler

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Pass one request on, or fail it."""
        path, _, query = handler.path.partition("?")
        length = int(handler.headers.get("Content-Length") or 0)
        call = Call(handler.command, path, query, handler.rfile.read(length), handler.headers.get("User-Agent") or "")
        if call.mutating:
            with self._lock:
                self.tried.append(call)
        fault = self.fault(call)
        if fault is not None and fault.before is not None:
            fault.before()
            handler.close_connection = True
            return
        if fault is not None and fault.status is not None:
            self._answer(handler, fault.status, _status(fault.status, fault.message), fault.headers)
            return
        try:
            self._pass_on(handler, call, fault)
        except (OSError, http.client.HTTPException):
            handler.close_connection = True  # one of the two sides has gone

    def _pass_on(self, handler: BaseHTTPRequestHandler, call: Call, fault: Fault | None) -> None:
        upstream = http.client.HTTPSConnection(self._host, self._port, context=self._context, timeout=90)
        try:
            headers = {n: v for n, v in handler.headers.items() if n.lower() not in {"host", "connection"}}
            upstream.request(call.method, handler.path, call.body or None, headers)
            if call.watch and upstream.sock is not None:
                with self._lock:
                    self._watches.add(upstream.sock)
            answer = upstream.getresponse()
            if call.watch and answer.status == 200:
                self._relay(handler, answer)
                return
            data = answer.read()
            if call.mutating and answer.status < 300:
                with self._lock:
                    self.calls.append(call)
            if fault is not None and fault.after is not None:
                fault.after()
                handler.close_connection = True
                return
            kept = {n: v for n, v in answer.getheaders() if n.lower() in {"content-type", "retry-after"}}
            self._answer(handler, answer.status, data, kept)
        finally:
            if upstream.sock is not None:
                with self._lock:
                    self._watches.discard(upstream.sock)
            upstream.close()

    @staticmethod
    def _answer(handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _relay(self, handler: BaseHTTPRequestHandler, answer: http.client.HTTPResponse) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            data = answer.read1(65536)
            if not data:
                break
            if self.mute.is_set():
                continue  # swallowed for good, as by a connection of which one end has died
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            handler.wfile.flush()
        handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True


def _status(code: int, message: str) -> bytes:
    reasons = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
    return json.dumps(
        {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message,
         "reason": reasons.get(code, "Unknown")}
    ).encode()  # fmt: skip


def once(matches: Callable[[Call], object], fault: Fault) -> Rule:
    """Return a rule that fails the first matching request only."""
    lock, spent = threading.Lock(), threading.Event()

    def rule(call: Call) -> Fault | None:
        with lock:
            if spent.is_set() or not matches(call):
                return None
            spent.set()
            return fault

    return rule


def nth(number: int, matches: Callable[[Call], object], fault: Fault) -> Rule:
    """Return a rule that fails the ``number``-th matching request only, counted from 1."""
    lock, count = threading.Lock(), [0]

    def rule(call: Call) -> Fault | None:
        with lock:
            if not matches(call):
                return None
            count[0] += 1
            return fault if count[0] == number else None

    return rule
