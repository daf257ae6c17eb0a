"""A small async Kubernetes client: JSON requests and typed errors. It retries nothing."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import kopf

from dpo_operator.runtime.resources import Resource

MERGE_PATCH = "application/merge-patch+json"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"

_LOGIN_SECONDS = 600.0
"""A pod's token is rotated on disk and is read again at least this often."""


class ApiError(Exception):
    """An error response of the API server. ``status``: HTTP; ``reason`` and ``message``: those of its Status object."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        """Store the fields of the response."""
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after


class Unreachable(Exception):  # noqa: N818 - a state of the network, not an error of ours
    """No response: the connection failed or timed out. Whether the request was carried out is unknown."""


class Client:
    """Requests under one identity. Closed by ``close``."""

    def __init__(self, login: Callable[[], kopf.ConnectionInfo], *, timeout: float = 30.0, user_agent: str) -> None:
        """``login`` is called again when the credentials age or are refused."""
        self._login = login
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=5.0)
        self._agent = user_agent
        self._session: aiohttp.ClientSession | None = None
        self._server = ""
        self._since = 0.0

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _open(self) -> aiohttp.ClientSession:
        if self._session is not None and time.monotonic() - self._since < _LOGIN_SECONDS:
            return self._session
        info = await asyncio.to_thread(self._login)
        old = self._session
        self._server = (info.server or "").rstrip("/")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=64, ssl=info.as_ssl_context()),
            headers={**info.as_http_headers(), "User-Agent": self._agent},
            # Looked up once: with trust_env aiohttp would look for a proxy and a .netrc at every request.
            proxy=info.proxy_url or (_proxy(self._server) if info.trust_env else None),
        )
        self._since = time.monotonic()
        if old is not None:
            # Requests in progress finish on the old connections.
            _closing = asyncio.get_running_loop().call_later(60.0, lambda: asyncio.ensure_future(old.close()))
        return self._session

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Any:
        """Send one request and return the answer's JSON. Raises ApiError from 400 on, and Unreachable."""
        for attempt in (1, 2):
            session = await self._open()
            try:
                async with session.request(
                    method,
                    self._server + path,
                    data=None if body is None else json.dumps(body, allow_nan=False),
                    params=dict(params or {}),
                    headers={"Content-Type": content_type, "Accept": accept},
                    timeout=self._timeout,
                    allow_redirects=False,
                ) as answer:
                    payload = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Unreachable(f"{method} {path}: {type(error).__name__}: {error}") from error
            if answer.status == 401 and attempt == 1:
                self._since = float("-inf")  # the token was rotated: read it again, once
                continue
            break
        if answer.status >= 300:
            raise _error(answer.status, payload, answer.headers.get("Retry-After"))
        try:
            return json.loads(payload)
        except ValueError as error:
            raise Unreachable(f"{method} {path}: the response is not JSON") from error

    async def raw(self, path: str, limit: int) -> bytes:
        """Return the bytes of an answer of at most ``limit`` bytes. Raises ApiError, aiohttp's errors, TimeoutError."""
        session = await self._open()
        async with session.get(self._server + path, allow_redirects=False, timeout=self._timeout) as answer:
            if answer.status != 200:
                raise _error(answer.status, await answer.content.read(500), None)
            return await bounded(answer, limit)

    async def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any]:
        """Read one object."""
        found: dict[str, Any] = await self.request("GET", resource.path(namespace, name))
        return found

    async def find(self, resource: Resource, namespace: str, name: str) -> dict[str, Any] | None:
        """Read one object; None if there is none."""
        try:
            return await self.get(resource, namespace, name)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False
    ) -> dict[str, Any]:
        """Create one object; an unknown field is refused."""
        params = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        made: dict[str, Any] = await self.request("POST", resource.path(namespace), body, params=params)
        return made

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """Delete one object in the background, only while it has this UID."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        await self.request("DELETE", resource.path(namespace, name), options)

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Merge-patch the status of one object."""
        path = resource.path(namespace, name, "status")
        done: dict[str, Any] = await self.request("PATCH", path, body, content_type=MERGE_PATCH)
        return done

    async def pages(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        selector: str | None = None,
        limit: int = 500,
        accept: str = "application/json",
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield a collection page by page, so that a large one is never in memory as a whole.

        ``selector``: by labels; None: the kind's own.
        """
        params = {"limit": str(limit)}
        if selector or resource.selector:
            params["labelSelector"] = selector or resource.selector
        while True:
            page = await self.request("GET", resource.path(namespace), params=params, accept=accept)
            yield page.get("items") or []
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return
            params["continue"] = token


async def bounded(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read a response of at most ``limit`` bytes. Raises ClientError for a longer one before reading all of it."""
    parts, size = [], 0
    async for part in answer.content.iter_chunked(16 * 1024):
        size += len(part)
        if size > limit:
            raise aiohttp.ClientError(f"the response is larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _proxy(server: str) -> str | None:
    """Return the proxy that the environment names for a server (HTTPS_PROXY, NO_PROXY and so on)."""
    parts = urllib.parse.urlsplit(server)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    found = urllib.request.getproxies()
    return found.get(parts.scheme) or found.get("all")


def _error(status: int, payload: bytes, retry_after: str | None) -> ApiError:
    try:
        said = json.loads(payload)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        said = {"message": payload[:500].decode(errors="replace")}
    try:
        seconds = float(retry_after) if retry_after else None
    except ValueError:
        seconds = None
    return ApiError(status, str(said.get("reason") or ""), str(said.get("message") or ""), seconds)
