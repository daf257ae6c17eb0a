"""The certificate and the token of rank 0's HTTP server, as files of one folder: a mounted Secret."""

import hmac
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from dpo_api.errors import AccessDeniedError

VARIABLE = "DPO_METRICS_CREDENTIALS"
"""Environment variable that names the folder. The operator sets it; not set, the server is plain HTTP."""

CERTIFICATE, KEY, TOKEN = "tls.crt", "tls.key", "token"


class Credentials:
    """Reads the files again when they have changed: a run can outlive its certificate."""

    def __init__(self, folder: Path) -> None:
        """Read the files. Raises AccessDeniedError if one is missing or is not what its name says."""
        self._folder = folder
        try:
            self._load()
            token = self._token()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise AccessDeniedError(self._useless(f"{type(error).__name__}: {error}")) from None
        if not token:
            raise AccessDeniedError(self._useless(f"{TOKEN} is empty"))

    def _useless(self, why: str) -> str:
        needed = f"{CERTIFICATE} and {KEY} (PEM) and {TOKEN}"
        return f"{self._folder} ({VARIABLE}) must hold {needed} for the metrics server: {why}"

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the credentials that the environment names; None if it names none."""
        folder = environment.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    def secure(self, connection: socket.socket) -> ssl.SSLSocket:
        """Return the connection with TLS, without waiting for the handshake."""
        try:
            if self._version() != self._loaded:
                self._load()
        except (OSError, ValueError):
            pass  # half of a renewal, or files that are gone: the certificate in use stays
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def admit(self, authorization: str | None) -> bool:
        """Whether a request's Authorization header holds the token."""
        scheme, _, token = (authorization or "").partition(" ")
        try:
            expected = self._token()
        except OSError:
            return False
        return bool(expected) and scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), expected)

    def _token(self) -> bytes:
        return (self._folder / TOKEN).read_bytes().strip()

    def _version(self) -> tuple[int, ...]:
        return tuple((self._folder / name).stat().st_mtime_ns for name in (CERTIFICATE, KEY))

    def _load(self) -> None:
        version, context = self._version(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._folder / CERTIFICATE, self._folder / KEY)
        self._context, self._loaded = context, version
