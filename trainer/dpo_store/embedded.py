"""A small S3 server of this machine's own, for the quickstart: nothing to install but the ``quickstart`` extra.

    python -m dpo_store.embedded --bucket quickstart --folder data -- dpo run -f examples/quickstart.yaml

runs the command with an environment in which boto3 finds the server, and ends with it and its exit code. Without a
command it prints one line of JSON, {"endpoint": ..., "environment": {...}}, and serves until it is stopped.

The server is moto's: it listens on loopback only, takes any credentials and keeps its objects in memory, so it is for
small data that may vanish. Never use it for anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dpo_api.errors import DPOError, NotFoundError, PortInUseError, UsageError
from dpo_store.options import RetryPolicy, StorageOptions, Timing
from dpo_store.store import Store


def environment(endpoint: str) -> dict[str, str]:
    """Return the variables with which boto3, and so every part of this project, finds the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "quickstart",
        "AWS_SECRET_ACCESS_KEY": "quickstart",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@contextlib.contextmanager
def embedded_s3(bucket: str, folder: Path | None = None, port: int = 0) -> Iterator[str]:
    """Run the server in a child process until the block ends; yield its endpoint.

    ``bucket`` exists and holds the files of ``folder``. Port 0: any free one. Raises PortInUseError.
    """
    command = [sys.executable, "-m", "dpo_store.embedded", "--bucket", bucket, "--port", str(port)]
    if folder is not None:
        command += ["--folder", str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None  # noqa: S101 (it is a pipe)
        line = child.stdout.readline()
        if not line:  # it has said why on stderr
            error = PortInUseError if child.wait() == PortInUseError.outcome.exit_code else DPOError
            raise error("the embedded S3 server did not start")
        yield json.loads(line)["endpoint"]
    finally:
        child.terminate()
        child.wait()


@contextlib.contextmanager
def _serving(port: int) -> Iterator[str]:
    """Run moto's server in a thread of this process."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise UsageError("the embedded S3 server needs moto: pip install 'dpo-operator[quickstart]'") from error
    # moto would wait for ever for a thread that could not bind.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise PortInUseError(f"port {port} is taken; choose another with --port, or 0 for any") from error
        port = probe.getsockname()[1]
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


def _fill(endpoint: str, bucket: str, folder: Path | None) -> None:
    import boto3

    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    if folder is not None:
        Store(StorageOptions(endpoint=endpoint), RetryPolicy(), Timing()).upload_tree(folder, f"s3://{bucket}/")


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dpo_store.embedded", description="A small S3 server in memory.")
    parser.add_argument("--bucket", required=True, help="bucket to create")
    parser.add_argument("--folder", type=Path, help="folder whose files become the bucket's objects")
    parser.add_argument("--port", type=int, default=0, help="loopback port; 0 (the default) for any free one")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="-- and a command to run with the server's environment"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the server; return the command's exit code, or 0 when stopped."""
    asked = _arguments(sys.argv[1:] if words is None else words)
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    try:
        if asked.folder is not None and not asked.folder.is_dir():
            raise NotFoundError(f"--folder: {asked.folder} is not a folder")
        with _serving(asked.port) as endpoint:
            variables = environment(endpoint)
            os.environ.update(variables)
            _fill(endpoint, asked.bucket, asked.folder)
            if command:
                return subprocess.run(command, check=False).returncode
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            print(json.dumps({"endpoint": endpoint, "environment": variables}), flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
            return 0
    except DPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
