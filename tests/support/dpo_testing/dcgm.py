"""Plays NVIDIA's dcgm-exporter: its documented series, with the labels that it gives a GPU used by a pod."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

VALUES: dict[str, float] = {
    "DCGM_FI_DEV_GPU_UTIL": 97,
    "DCGM_FI_DEV_FB_USED": 61_440,
    "DCGM_FI_DEV_FB_FREE": 20_480,
    "DCGM_FI_DEV_POWER_USAGE": 612.5,
    "DCGM_FI_DEV_GPU_TEMP": 61,
    "DCGM_FI_DEV_XID_ERRORS": 0,
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.44,
}


class DcgmExporter:
    """A context manager that serves the series of some GPUs, all used by one pod."""

    def __init__(self, namespace: str, pod: str, gpus: Iterable[int]) -> None:
        """Bind a free loopback port."""
        lines = []
        for name, value in VALUES.items():
            lines.append(f"# TYPE {name} gauge")
            for gpu in gpus:
                labels = (
                    f'gpu="{gpu}",UUID="GPU-{gpu}",device="nvidia{gpu}",modelName="NVIDIA H200",Hostname="node-0",'
                    f'container="trainer",namespace="{namespace}",pod="{pod}"'
                )
                lines.append(f"{name}{{{labels}}} {value}")
        body = ("\n".join(lines) + "\n").encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        """Start serving."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
