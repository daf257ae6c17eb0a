"""Rank 0's HTTP server with a certificate and a token, over real TLS."""

import http.client
import os
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_api.errors import AccessDeniedError
from dpo_testing.pki import Authority
from dpo_trainer.metrics.credentials import VARIABLE, Credentials
from dpo_trainer.metrics.prometheus import PrometheusMetrics
from dpo_trainer.metrics.server import StatusServer

NAME = "dpo-trainer"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("metrics")


@pytest.fixture
def folder(authority: Authority, tmp_path: Path) -> Path:
    """What a mounted Secret looks like, and beside it the CA that a client gets."""
    secret = tmp_path / "secret"
    secret.mkdir()
    issue(authority, secret)
    (secret / "token").write_text("right-token\n")
    (tmp_path / "ca.crt").write_bytes(authority.pair.certificate)
    return secret


def issue(authority: Authority, folder: Path) -> None:
    pair = authority.server(NAME, [NAME])
    (folder / "tls.crt").write_bytes(pair.certificate)
    (folder / "tls.key").write_bytes(pair.key)


@pytest.fixture
def server(folder: Path) -> Iterator[StatusServer]:
    running = StatusServer(PrometheusMetrics().registry, 0, "127.0.0.1", Credentials.of({VARIABLE: str(folder)}))
    yield running
    running.close()


def get(server: StatusServer, path: str, authorization: str | None = None, ca: Path | None = None) -> tuple[int, bytes]:
    """Ask as Prometheus does, with the CA and the server's name; without a CA, as the kubelet does."""
    return whole(server, path, authorization, ca)[:2]


def whole(
    server: StatusServer, path: str, authorization: str | None, ca: Path | None
) -> tuple[int, bytes, str | None, bytes | None]:
    context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    if ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    with context.wrap_socket(raw, server_hostname=NAME) as secured:
        connection = http.client.HTTPConnection(NAME)
        connection.sock = secured
        connection.request("GET", path, headers={} if authorization is None else {"Authorization": authorization})
        answer = connection.getresponse()
        certificate = secured.getpeercert(binary_form=True)
        return answer.status, answer.read(), answer.headers["WWW-Authenticate"], certificate


@pytest.mark.parametrize("path", ["/metrics", "/status", "/unknown"])
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", "Basic right-token", "Bearer right-token2", "Bearer \xff"]
)
def test_without_the_token_nothing_is_shown(
    server: StatusServer, tmp_path: Path, path: str, authorization: str | None
) -> None:
    status, body, challenge, _ = whole(server, path, authorization, tmp_path / "ca.crt")
    assert (status, body, challenge) == (401, b"a bearer token is needed\n", "Bearer")


def test_with_the_token_all_is_as_without_tls(server: StatusServer, tmp_path: Path) -> None:
    found = {path: get(server, path, "Bearer right-token", tmp_path / "ca.crt")[0] for path in ("/metrics", "/status")}
    assert found == {"/metrics": 200, "/status": 503}  # no progress yet


def test_the_kubelet_needs_neither_ca_nor_token(server: StatusServer) -> None:
    assert get(server, "/healthz") == (200, b"ok\n")


def test_a_reader_that_does_not_speak_tls_blocks_nobody(
    server: StatusServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"dpo_" not in plain.recv(4096)
    with socket.create_connection(("127.0.0.1", server.port)):  # it connects and says nothing
        assert get(server, "/healthz")[0] == 200
    assert capsys.readouterr().err == ""


def test_a_renewed_certificate_and_token_are_used(
    server: StatusServer, folder: Path, tmp_path: Path, authority: Authority
) -> None:
    """cert-manager renews certificates of 90 days; a run may take longer."""
    before = whole(server, "/healthz", None, tmp_path / "ca.crt")[3]
    issue(authority, folder)
    for name in ("tls.crt", "tls.key"):  # on a file system with coarse times, both writes could have the same
        os.utime(folder / name, ns=(1, 1))
    (folder / "token").write_text("newer-token")
    assert whole(server, "/healthz", None, tmp_path / "ca.crt")[3] not in (None, before)
    assert get(server, "/metrics", "Bearer right-token", tmp_path / "ca.crt")[0] == 401
    assert get(server, "/metrics", "Bearer newer-token", tmp_path / "ca.crt")[0] == 200


def test_half_of_a_renewal_changes_nothing(server: StatusServer, folder: Path, tmp_path: Path) -> None:
    before = whole(server, "/healthz", None, tmp_path / "ca.crt")[3]
    (folder / "tls.key").write_text("")
    (folder / "token").unlink()
    assert whole(server, "/healthz", None, tmp_path / "ca.crt")[3] == before
    assert get(server, "/metrics", "Bearer right-token", tmp_path / "ca.crt")[0] == 401
    assert get(server, "/metrics", "Bearer ", tmp_path / "ca.crt")[0] == 401


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "tls.crt").unlink(), "tls.crt"),
        (lambda folder: (folder / "tls.key").write_text("no key"), "SSLError"),
        (lambda folder: (folder / "token").unlink(), "token"),
        (lambda folder: (folder / "token").write_text(" \n"), "token is empty"),
        (shutil.rmtree, "No such file"),
    ],
)
def test_credentials_that_cannot_be_used_end_the_run_by_name(folder: Path, damage: object, said: str) -> None:
    """It must not fall back to plain HTTP."""
    assert callable(damage)
    damage(folder)
    with pytest.raises(AccessDeniedError, match=f"^{folder} \\({VARIABLE}\\) must hold tls.crt and tls.key .*{said}"):
        Credentials.of({VARIABLE: str(folder)})


def test_without_the_variable_there_are_none() -> None:
    assert Credentials.of({}) is None
    assert Credentials.of({VARIABLE: ""}) is None
