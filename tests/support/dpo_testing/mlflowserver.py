"""MLflow's own tracking server: its request handlers over SQLite, in a process of its own.

``python -m dpo_testing.mlflowserver FOLDER PORT`` serves. While FOLDER/away exists, every request is answered with 503;
while FOLDER/token does, requests need it as a bearer token.
"""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

from dpo_testing.s3server import free_port

_START_SECONDS = 180


class MlflowServer:
    """A running server. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Start it, with its database in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, port = folder, free_port()
        self.uri = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-W", "ignore", "-m", "dpo_testing.mlflowserver", str(folder), str(port)]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)

    def __enter__(self) -> Self:
        """Wait until it answers."""
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self.uri + "/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self._process.kill()
        raise RuntimeError(f"MLflow's server did not start:\n{(self._folder / 'log').read_text()}")

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait()

    def away(self, away: bool = True) -> None:
        """Answer nothing but 503, or answer again."""
        file = self._folder / "away"
        file.touch() if away else file.unlink()

    def require(self, token: str | None) -> None:
        """Admit nobody without this token; None: anybody."""
        file = self._folder / "token"
        file.unlink() if token is None else file.write_text(token)

    def client(self) -> Any:
        """Return MLflow's client of it."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)


def serve(folder: Path, port: int) -> None:
    """Serve until the process ends."""
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = str(folder / "artifacts")
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    from flask import abort, request
    from mlflow.server import app
    from werkzeug.serving import make_server

    @app.before_request
    def gate() -> None:
        if (folder / "away").exists():
            abort(503)
        if (folder / "token").exists():
            expected = f"Bearer {(folder / 'token').read_text()}"
            if request.headers.get("Authorization") != expected:
                abort(401)

    make_server("127.0.0.1", port, app, threaded=True).serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
