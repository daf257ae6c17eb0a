"""/metrics, /healthz and /readyz over HTTP or HTTPS. Only /metrics may need a token."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from dpo_operator.runtime.authentication import Gate

RELOAD_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Certificate:
    """A certificate and its key in two files, which are read again when they change, as cert-manager's Secrets do."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read the files. Raises OSError (ssl.SSLError is one) where they cannot be used."""
        self._files = certificate, key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._read = self._written()
        self.context.load_cert_chain(*self._files)

    def _written(self) -> tuple[int, ...]:
        return tuple(file.stat().st_mtime_ns for file in self._files)

    def reload(self) -> bool:
        """Read the files again if they have changed; return whether they had. New connections use the new ones."""
        try:
            written = self._written()
            if written == self._read:
                return False
            self.context.load_cert_chain(*self._files)
        except OSError as error:
            _log.warning("the certificate %s cannot be used, the former one is still served: %s", self._files[0], error)
            return False
        self._read = written
        return True

    async def watch(self) -> None:
        """Reload until cancelled."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            if self.reload():
                _log.info("the certificate %s has changed and is used now", self._files[0])


async def serve(
    address: str,
    port: int,
    *,
    metrics: Callable[[], Awaitable[bytes]],
    alive: Callable[[], str],
    ready: Callable[[], str],
    certificate: Certificate | None = None,
    gate: Gate | None = None,
) -> tuple[web.AppRunner, int]:
    """Start serving; return the runner, to be cleaned up, and the port.

    ``alive`` and ``ready`` return an empty text, or in one sentence why not. ``gate``: who may read the metrics.
    """

    async def answer_metrics(request: web.Request) -> web.Response:
        if gate is not None:
            refused = await gate.refuses(request.headers.get("Authorization", ""), request.path)
            if refused is not None:
                headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
                return web.Response(text=f"{refused.text}\n", status=refused.status, headers=headers)
        return web.Response(body=await metrics(), content_type="text/plain", charset="utf-8")

    def probe(ask: Callable[[], str]) -> Callable[[web.Request], object]:
        async def answer(_: web.Request) -> web.Response:
            why_not = ask()
            return web.Response(text=f"{why_not or 'ok'}\n", status=503 if why_not else 200)

        return answer

    application = web.Application()
    application.router.add_get("/metrics", answer_metrics)
    application.router.add_get("/healthz", probe(alive))  # type: ignore[arg-type]
    application.router.add_get("/readyz", probe(ready))  # type: ignore[arg-type]
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, address, port, ssl_context=certificate.context if certificate is not None else None)
    await site.start()
    bound: int = runner.addresses[0][1]
    return runner, bound
