"""The operator's certificate: read at start, read again when it changes, and named when it cannot be used."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_operator.runtime.options import parse
from dpo_operator.runtime.server import Certificate
from dpo_testing.pki import Authority


def write(folder: Path, authority: Authority, age: int) -> tuple[Path, Path]:
    """Write a new certificate, with a time of its own: two writes may fall into one tick of the clock."""
    files = authority.server("operator", ["localhost"]).write(folder, "tls")
    for file in files:
        os.utime(file, (age, age))
    return files


def served(context: ssl.SSLContext, ca: Path) -> bytes:
    """Return the certificate that a new connection gets, without a network."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_context = ssl.create_default_context(cafile=str(ca))
    client = client_context.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    found = client.getpeercert(binary_form=True)
    assert found is not None
    return found


def test_a_changed_certificate_is_served_without_a_restart(tmp_path: Path) -> None:
    authority = Authority("ca")
    ca, _ = authority.pair.write(tmp_path, "ca")
    certificate = Certificate(*write(tmp_path, authority, 1_000))
    first = served(certificate.context, ca)
    assert not certificate.reload()
    write(tmp_path, authority, 2_000)
    assert certificate.reload()
    second = served(certificate.context, ca)
    assert first != second
    # A half-written file is not used.
    (tmp_path / "tls.crt").write_text("no certificate")
    assert not certificate.reload()
    assert served(certificate.context, ca) == second
    write(tmp_path, authority, 3_000)
    assert certificate.reload()
    assert served(certificate.context, ca) not in (first, second)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tls-cert-file=tls.crt"], "--tls-key-file: not set"),
        (["--tls-key-file=tls.key"], "--tls-cert-file: not set"),
        (["--metrics-auth=token"], "--metrics-auth=token: needs --tls-cert-file"),
        (["--metrics-auth=basic"], "'basic'; give off or token"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flags, {})
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_certificate_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tls.crt").write_text("x")
    command = [
        sys.executable, "-m", "dpo_operator", f"--tls-cert-file={tmp_path}/tls.crt",
        f"--tls-key-file={tmp_path}/tls.key",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"--tls-cert-file={tmp_path}/tls.crt" in done.stderr
    assert "give a certificate and its key in PEM" in done.stderr
