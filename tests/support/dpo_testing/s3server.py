"""A real S3 server for tests: versitygw over a folder, on a free loopback port, with random credentials."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from dpo_store import StorageOptions

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_REPOSITORY: Final = Path(__file__).resolve().parents[3]
_START_SECONDS: Final = 20.0


class ToolMissingError(RuntimeError):
    """A program of the tests can't be built here because Go is missing."""


@dataclass(frozen=True)
class S3Server:
    """A running server. ``folder/<bucket>/<key>`` are its objects' files."""

    endpoint: str
    access_key: str
    secret_key: str
    folder: Path

    def environment(self, *, endpoint: str | None = None) -> dict[str, str]:
        """Return what boto3 reads to reach this server, and nothing of this machine's own configuration."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            **no_aws(),
        }

    def options(self, *, endpoint: str | None = None) -> StorageOptions:
        """Return options that name this server (or a proxy in front of it)."""
        return StorageOptions(endpoint=endpoint or self.endpoint)

    @functools.cache  # noqa: B019 (a server lives as long as its tests)
    def client(self) -> S3Client:
        """Return a plain boto3 client with this server's credentials, to look behind the store's back."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )

    def make_bucket(self, name: str) -> None:
        """Create a bucket."""
        self.client().create_bucket(Bucket=name)


def no_aws() -> dict[str, str]:
    """Return an environment in which boto3 finds no configuration file, no instance role and no proxy."""
    return {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@functools.cache
def tool(name: str) -> Path:
    """Return the path of a program of hack/tools; the first time on a machine, build it or wait for its build.

    Raises ToolMissingError where Go is missing, RuntimeError with the build's output where the build fails.
    """
    with _untimed():
        done = subprocess.run(
            [str(_REPOSITORY / "hack" / "build-tools.sh"), name], capture_output=True, text=True, check=False
        )
    if done.returncode == 3:
        raise ToolMissingError(done.stderr.strip())
    if done.returncode != 0:
        raise RuntimeError(f"hack/build-tools.sh {name} failed:\n{done.stderr}")
    return Path(done.stdout.strip())


def module_of(module: str) -> Path:
    """Return the folder of a Go module's sources, of the version that hack/tools pins; download it if need be."""
    tools = _REPOSITORY / "hack" / "tools"
    own = tools / module.rpartition("/")[2]
    with _untimed():
        done = subprocess.run(
            ["go", "mod", "download", "-json", module],
            cwd=own if own.exists() else tools, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"go mod download {module} failed:\n{done.stdout}{done.stderr}")
    return Path(json.loads(done.stdout)["Dir"])


@contextlib.contextmanager
def _untimed() -> Iterator[None]:
    """Stop pytest-timeout's clock, which is this timer: a first build takes minutes, whichever test it is for."""
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)


def need(*names: str) -> None:
    """Build the programs that a test runs, or skip it where Go is missing."""
    try:
        for name in names:
            tool(name)
    except ToolMissingError as error:
        pytest.skip(str(error))


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def s3_server(certificate: tuple[Path, Path] | None = None) -> Iterator[S3Server]:
    """Run versitygw until the block ends; its folder is removed afterwards.

    With ``certificate`` (PEM files of the certificate and its key) it speaks HTTPS.
    """
    binary = tool("versitygw")
    base = Path(tempfile.mkdtemp(prefix="dpo-s3-"))
    try:
        for name in ("objects", "metadata"):
            (base / name).mkdir()
        access, secret = "AK" + secrets.token_hex(9).upper(), secrets.token_urlsafe(30)
        process, port = _start(binary, base, access, secret, certificate)
        try:
            yield S3Server(f"http{'s' if certificate else ''}://127.0.0.1:{port}", access, secret, base / "objects")
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _start(
    binary: Path, base: Path, access: str, secret: str, certificate: tuple[Path, Path] | None
) -> tuple[subprocess.Popen[bytes], int]:
    tls = ["--cert", str(certificate[0]), "--key", str(certificate[1])] if certificate else []
    # Another process may take the port between our look and the server's start: then try another.
    for _ in range(5):
        port = free_port()
        with (base / "log").open("ab") as log:
            process = subprocess.Popen(
                # Metadata in a second folder: not every file system of a test machine has extended attributes.
                # Files put there by hand have no stored ETag, so name one.
                [str(binary), "--port", f"127.0.0.1:{port}", "--quiet", "--keep-alive", *tls,
                 "posix", "--sidecar", str(base / "metadata"), "--default-etag", '"by-hand"', str(base / "objects")],
                env={"PATH": os.environ.get("PATH", ""), "ROOT_ACCESS_KEY": access, "ROOT_SECRET_KEY": secret},
                stdout=log,
                stderr=log,
            )  # fmt: skip
        if _ready(process, f"http{'s' if tls else ''}://127.0.0.1:{port}/"):
            return process, port
        process.kill()
        process.wait()
    raise RuntimeError(f"versitygw did not start:\n{(base / 'log').read_text(errors='replace')[-2000:]}")


def _ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=anyone))
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opener.open(url, timeout=2).close()
        except urllib.error.HTTPError as answer:
            answer.close()
            return True  # "access denied" comes from a server that works
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False
