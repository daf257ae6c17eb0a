"""Rank 0's HTTP server: /metrics for Prometheus, /status for the operator, /healthz for the kubelet.

With a folder of credentials it serves HTTPS, and /metrics and /status need its bearer token. /healthz never does: the
kubelet's probe has no token, and does not check the certificate.
"""

import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from ssl import SSLError
from typing import Any, ClassVar
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from dpo_api.errors import AccessDeniedError, PortInUseError
from dpo_api.progress import Progress
from dpo_trainer.metrics.credentials import Credentials

DEFAULT_PORT = 9400


class StatusServer:
    """Serves in its own threads until closed. A step never waits for a reader, and a reader never waits for a step.

    ``publish`` sets the response of /status, the newest Progress as JSON. Before the first one it is 503.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        port: int = DEFAULT_PORT,
        host: str = "",
        credentials: Credentials | None = None,
    ) -> None:
        """Listen on ``port`` (0: a free one) of ``host`` (empty: all addresses, IPv4 and IPv6).

        credentials: serve HTTPS and ask for the token. Raises PortInUseError if another process uses the port,
        AccessDeniedError if this user may not use it.
        """
        self._newest: bytes | None = None
        self.credentials = credentials
        handler = type("_BoundHandler", (_Handler,), {"owner": self, "registry": registry})
        try:
            self._server = _Server(host, port, handler, credentials)
        except PermissionError:
            raise AccessDeniedError(f"port {port} is not open to this user: choose one above 1023") from None
        except OSError as error:
            where = f"{host} port {port}" if host else f"port {port}"
            raise PortInUseError(f"cannot listen on {where}: {error.strerror}; choose another with --port") from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="status-server", daemon=True
        )
        self._thread.start()

    def publish(self, progress: Progress) -> None:
        """Set the newest status."""
        self._newest = (progress.to_json() + "\n").encode()

    @property
    def newest(self) -> bytes | None:
        """The response body of /status."""
        return self._newest

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a reader that hangs must not delay the end of a run

    def __init__(
        self, host: str, port: int, handler: type[BaseHTTPRequestHandler], credentials: Credentials | None
    ) -> None:
        self._credentials = credentials
        self._both = host == "" and socket.has_dualstack_ipv6()
        if self._both or ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host or ("::" if self._both else "0.0.0.0"), port), handler)  # noqa: S104 - scraped from outside

    def server_bind(self) -> None:
        if self._both:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer's method looks up the host's name, which can take seconds if DNS is slow.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Return a connection. Its TLS handshake is part of the first read, in a thread of its own."""
        connection, address = super().get_request()
        return (self._credentials.secure(connection) if self._credentials is not None else connection), address

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Ignore a reader that closes the connection or fails the handshake; print other errors in one line."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError | SSLError):
            print(f"status server: {type(error).__name__}: {error}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    owner: ClassVar[StatusServer]
    registry: ClassVar[CollectorRegistry]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dpo-trainer", ""
    timeout = 30  # seconds an idle connection is kept

    def do_GET(self) -> None:
        path, credentials = urlsplit(self.path).path, self.owner.credentials
        if path != "/healthz" and credentials is not None and not credentials.admit(self.headers.get("Authorization")):
            self._answer(HTTPStatus.UNAUTHORIZED, b"a bearer token is needed\n", "text/plain; charset=utf-8")
            return
        match path:
            case "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, encode(self.registry), content_type)
            case "/status":
                newest = self.owner.newest
                if newest is None:
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"no progress yet\n", "text/plain; charset=utf-8")
                else:
                    self._answer(HTTPStatus.OK, newest, "application/json")
            case "/healthz":
                self._answer(HTTPStatus.OK, b"ok\n", "text/plain; charset=utf-8")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"/metrics, /status or /healthz\n", "text/plain; charset=utf-8")

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing: a scrape every few seconds would fill the log."""
