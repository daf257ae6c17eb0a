"""How the operator recognises a trainer that serves HTTPS, and what it shows to it: files of a mounted Secret."""

from __future__ import annotations

import re
import ssl
from http.client import HTTPException
from pathlib import Path

CA, TOKEN = "ca.crt", "token"

_TOKEN = re.compile(r"[!-~]+")
"""A token must fit into one header line."""


class Trust:
    """The CA and the token, read again when the files have changed. Nothing is read before the first request."""

    def __init__(self, folder: Path, server_name: str) -> None:
        """server_name: what a trainer's certificate must be for, since pods are asked by IP address."""
        self.server_name = server_name
        self._folder = folder
        self._context: ssl.SSLContext | None = None
        self._loaded = 0

    def context(self) -> ssl.SSLContext:
        """Return what checks a trainer's certificate. Raises OSError if the CA cannot be read."""
        path = self._folder / CA
        changed = path.stat().st_mtime_ns
        if self._context is None or changed != self._loaded:
            self._context, self._loaded = ssl.create_default_context(cafile=str(path)), changed
        return self._context

    def token(self) -> str:
        """Return the bearer token. Raises OSError if it cannot be read, HTTPException if it is not one word."""
        path = self._folder / TOKEN
        token = path.read_text(errors="replace").strip()
        if not _TOKEN.fullmatch(token):
            raise HTTPException(f"{path} must hold one word of printable ASCII characters")
        return token
