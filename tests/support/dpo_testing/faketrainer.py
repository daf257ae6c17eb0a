"""Plays rank 0's HTTP server: answers GET /status at a pod's address with what a test says."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from dpo_testing.fakekubelet import PORT
from dpo_testing.kubeapi import Object


def fence_of(pod: Object) -> int:
    """Return the number that a pod's trainer is started with."""
    (command,) = (c["command"] for c in pod["spec"]["containers"] if c["name"] == "pytorch")
    return int(command[command.index("--attempt") + 1])


class FakeTrainer:
    """A context manager that serves at one loopback address. ``say`` changes the answer."""

    def __init__(self, address: str, port: int = PORT, *, attempt: int = 1) -> None:
        """Bind ``address``:``port``. ``attempt``: the number that it answers with."""
        self.attempt = attempt
        self.status = 200
        self.body = b"{}"
        self.headers: dict[str, str] = {}
        self.delay = 0.0
        self.asked = 0
        self.heard: dict[str, str] = {}  #: headers of the newest request
        trainer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                trainer.asked += 1
                trainer.heard = dict(self.headers)
                time.sleep(trainer.delay)
                try:
                    self.send_response(trainer.status)
                    for name, value in trainer.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(trainer.body)
                except OSError:
                    pass  # the client has closed the connection

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

        self._server = ThreadingHTTPServer((address, port), Handler)
        self._server.daemon_threads = True

    @classmethod
    def of(cls, pod: Object) -> Self:
        """Return the trainer of a running pod."""
        return cls(pod["status"]["podIP"], attempt=fence_of(pod))

    def __enter__(self) -> Self:
        """Start serving."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()

    def say(self, **progress: Any) -> None:
        """Answer with this progress from now on, camelCase as the trainer writes it."""
        self.body = json.dumps(
            {"phase": "train", "observedAt": time.time(), "attempt": self.attempt, **progress}
        ).encode()
