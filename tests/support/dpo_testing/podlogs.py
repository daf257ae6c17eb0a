"""Plays the part of a kubelet that serves logs: the API server asks it for what `kubectl logs` prints."""

from __future__ import annotations

import ssl
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from dpo_testing.kubeapi import Api
from dpo_testing.pki import Authority

NODES = ("v1", "nodes")


class PodLogs:
    """A context manager. ``texts``: the log of each pod, by its name; a log that is followed ends after its text."""

    def __init__(self, api: Api) -> None:
        """Bind a free port; entering it announces the port as that of every node's kubelet."""
        self.texts: dict[str, str] = {}
        self._api = api
        logs = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                _, kind, _, pod, container = urlsplit(self.path).path.split("/")
                text = logs.texts.get(pod)
                known = (kind, container) == ("containerLogs", "pytorch") and text is not None
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", "text/plain")
                self.end_headers()
                self.wfile.write((text or "").encode())

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        with tempfile.TemporaryDirectory() as folder:
            pair = Authority("kubelets").server("kubelet", ["127.0.0.1"]).write(Path(folder), "kubelet")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*pair)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> Self:
        """Start serving."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_address[1]}},
        }
        for node in self._api.list(NODES):
            self._api.patch(NODES, None, node["metadata"]["name"], {"status": status}, sub="status")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
