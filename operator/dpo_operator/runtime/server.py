"""/metrics, /healthz and /readyz over HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web


async def serve(
    address: str,
    port: int,
    *,
    metrics: Callable[[], Awaitable[bytes]],
    alive: Callable[[], str],
    ready: Callable[[], str],
) -> tuple[web.AppRunner, int]:
    """Start serving; return the runner, to be cleaned up, and the port.

    ``alive`` and ``ready`` return an empty text, or in one sentence why not.
    """

    async def answer_metrics(_: web.Request) -> web.Response:
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
    site = web.TCPSite(runner, address, port)
    await site.start()
    bound: int = runner.addresses[0][1]
    return runner, bound
