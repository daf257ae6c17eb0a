"""A proxy in front of an S3 server that fails on order: the network as it is on a bad day."""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

from dpo_store import Timing

Kind = Literal["status", "reset", "short", "drip", "stall", "delay", "etag", "no_range"]

_BLOCK = 64 * 1024


@dataclass
class Fault:
    """What happens to the next ``times`` requests that match ``method`` and ``path``, after ``skip`` that pass.

    status: answer ``code`` (with S3's XML body naming ``reason``) without asking the server.
    reset: send ``after`` bytes of the body, then reset the connection.
    short: announce the whole length, send ``after`` bytes, then close the connection in good order.
    drip: after ``after`` bytes send one byte every ``seconds``.
    stall: after ``after`` bytes send nothing for ``seconds``, then close.
    delay: wait ``seconds`` before asking the server.
    etag: pass the answer on with another ETag.
    no_range: answer a request for a range as a server that knows no ranges would begin to.

    ``action`` is called first, whatever the kind (to change the object, say). ``lost``: with status, the server gets
    the request and acts on it, and only then its answer is replaced.
    """

    kind: Kind
    times: int = 1
    skip: int = 0
    method: str = "GET"
    path: str = ""
    after: int = 0
    seconds: float = 0.0
    code: int = 503
    reason: str = "SlowDown"
    lost: bool = False
    action: Callable[[], None] | None = None


@dataclass(frozen=True)
class Seen:
    """One request as it went through: what it asked for, and what was done to it."""

    method: str
    path: str
    range: str
    fault: Kind | None


@dataclass
class FaultProxy:
    """A running proxy: its endpoint, the faults still to come and the requests so far.

    ``sent`` counts the bytes of bodies that were passed on unspoiled, ``ended`` the answers that a client cut short.
    """

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    sent: int = 0
    ended: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: Kind, **settings: object) -> None:
        """Order a fault; see Fault."""
        with self._lock:
            self.faults.append(Fault(kind, **settings))  # type: ignore[arg-type]

    def clear(self) -> None:
        """Forget faults and requests."""
        with self._lock:
            self.faults.clear()
            self.seen.clear()

    def count(self, method: str = "GET", path: str = "") -> int:
        """Return how many requests of a method matched a path."""
        with self._lock:
            return sum(1 for s in self.seen if s.method == method and re.search(path, s.path))

    def _next(self, method: str, path: str, asked: str) -> Fault | None:
        with self._lock:
            hit = None
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    hit = fault
                    break
            self.seen.append(Seen(method, path, asked, hit.kind if hit else None))
            return hit


@dataclass
class Pauses:
    """Sleeps that take no time, written down; the random number is always a half."""

    taken: list[float] = field(default_factory=list)

    def timing(self) -> Timing:
        """Return the Timing to hand to a store."""
        return Timing(sleep=self.taken.append, random=lambda: 0.5)


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy for the server at the URL ``upstream`` until the block ends."""
    target = urlsplit(upstream)
    proxy = FaultProxy("")
    stopped = threading.Event()

    class Handler(_Handler):
        server_address = (target.hostname or "127.0.0.1", target.port or 80)
        rules = proxy
        stop = stopped

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_address: tuple[str, int]
    rules: FaultProxy
    stop: threading.Event

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Say nothing: the requests are in ``seen``."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.rules._next(self.command, self.path, self.headers.get("Range", ""))
        if fault is not None and fault.kind == "delay":
            self.stop.wait(fault.seconds)
        if fault is not None and fault.action is not None:
            fault.action()
        if fault is not None and fault.kind == "status" and not fault.lost:
            self._refuse(fault)
            return
        upstream = http.client.HTTPConnection(*self.server_address, timeout=60)
        try:
            self._forward(upstream, body, fault)
        except (BrokenPipeError, ConnectionResetError):  # the client went away, which is its right
            self.close_connection = True
            self.rules.ended += 1
        finally:
            upstream.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815 (the base class's names)

    def _forward(self, upstream: http.client.HTTPConnection, body: bytes, fault: Fault | None) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"connection", "expect"}:
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        if fault is not None and fault.kind == "status":
            answer.read()
            self._refuse(fault)
            return
        no_range = fault is not None and fault.kind == "no_range"
        self.send_response_only(200 if no_range else answer.status)
        has_length = False
        for name, value in answer.getheaders():
            if name.lower() == "etag" and fault is not None and fault.kind == "etag":
                self.send_header(name, '"another"')
            elif name.lower() not in {"connection", "transfer-encoding", "content-range" if no_range else ""}:
                has_length = has_length or name.lower() == "content-length"
                self.send_header(name, value)
        if not has_length:  # the server sent chunks: this proxy ends such a body by closing
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if fault is not None and fault.kind in {"reset", "short", "drip", "stall"}:
            self._spoil(answer, fault)
            return
        while block := answer.read(_BLOCK):
            self.wfile.write(block)
            self.rules.sent += len(block)

    def _refuse(self, fault: Fault) -> None:
        body = f"<Error><Code>{fault.reason}</Code><Message>on order</Message></Error>".encode()
        self.send_response_only(fault.code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _spoil(self, answer: http.client.HTTPResponse, fault: Fault) -> None:
        self.close_connection = True
        left = fault.after
        while left > 0 and (block := answer.read(min(_BLOCK, left))):
            self.wfile.write(block)
            left -= len(block)
        if fault.kind == "drip":
            while not self.stop.is_set() and (byte := answer.read(1)):
                self.wfile.write(byte)
                self.stop.wait(fault.seconds)
        elif fault.kind == "stall":
            self.stop.wait(fault.seconds)
        elif fault.kind == "reset":
            # Closing with data unsent and no linger is what makes TCP send a reset; give the sent bytes time to go.
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
            self.wfile = io.BytesIO()  # the base class flushes it once more
