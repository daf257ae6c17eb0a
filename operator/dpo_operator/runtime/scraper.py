"""Requests the progress of each running job from rank 0. Responses come from user code: size-limited, then parsed.

A failed request says something about the connection, not about the training: it never causes a restart.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import Literal

import aiohttp
from pydantic import ValidationError

from dpo_api.progress import Progress
from dpo_operator.runtime.cache import Key
from dpo_operator.runtime.client import ApiError, Client, Unreachable
from dpo_operator.runtime.trust import Trust
from dpo_operator.types import Scrape, ScrapeTarget

MAX_BYTES = 64 * 1024
MAX_HEAD_BYTES = 16 * 1024
SECONDS = 2.0
"""Time limit of a request, from connecting to the last byte."""

QUESTIONS_PER_SECOND = 8.0
"""Most requests per second over all jobs: a thousand jobs must not cost more than a few hundredths of a core."""

_BEAT_SECONDS = 2.0
"""Requests that are due within this time are sent together: eight separate ones per second cost twice as much CPU time,
most of it for waking up."""

_log = logging.getLogger(__name__)


def pace(interval: float, jobs: int) -> float:
    """Return the seconds between two requests to one of ``jobs`` trainers: ``interval``, or more for many jobs."""
    return max(interval, jobs / QUESTIONS_PER_SECOND)


def together(now: float, seconds: float) -> float:
    """Return about ``seconds``, rounded to the next moment at which other requests are sent."""
    beat = min(_BEAT_SECONDS, seconds / 10)
    return max(0.0, round((now + seconds) / beat) * beat - now)


class Scraper:
    """One task per running job. ``news`` is called with a job's key when a pass should look at an answer."""

    def __init__(
        self,
        client: Client,
        way: Literal["pod-ip", "api-proxy", "off"],
        news: Callable[[Key], None],
        *,
        interval: float,
        write_interval: float,
        trust: Trust | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``interval``: seconds between two requests (``pace``). ``write_interval``: between two reports.

        ``trust``: what is needed to ask trainers that serve HTTPS.
        """
        self._client = client
        self._way = way
        self._news = news
        self._interval = interval
        self._write_interval = write_interval
        self._trust = trust
        self._clock = clock
        self._targets: dict[Key, ScrapeTarget] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._newest: dict[Key, Scrape] = {}
        self._at_once = asyncio.Semaphore(64)
        self.failures = 0
        self.answers = 0

    def newest(self, key: Key) -> Scrape | None:
        """Return the newest response of a job's rank 0, or the newest failure to get one."""
        return self._newest.get(key)

    def aim(self, key: Key, target: ScrapeTarget | None, *, known: bool = False) -> None:
        """Request progress from this pod from now on; None: stop.

        ``known``: the status already has progress of this attempt, as after a restart of this process. Then the first
        request is delayed, so that a thousand jobs are spread over an interval.
        """
        if self._targets.get(key) == target:
            return
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()
        if target is None or self._way == "off":
            self._targets.pop(key, None)
            if target is None and key in self._newest:
                del self._newest[key]
            return
        self._targets[key] = target
        self._tasks[key] = asyncio.create_task(self._follow(key, target, known), name=f"scrape {key[0]}/{key[1]}")

    async def close(self) -> None:
        """Stop asking."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, key: Key, target: ScrapeTarget, known: bool) -> None:
        if known:
            await asyncio.sleep(0.1 * self._interval)  # until the number of jobs is known, which sets the pace
            await asyncio.sleep(random.uniform(0.0, pace(self._interval, len(self._tasks))))
        reported: Scrape | None = None
        reported_at = float("-inf")
        while True:
            async with self._at_once:
                answer = await self._ask(target)
            self._newest[key] = answer
            now = time.monotonic()
            due = now - reported_at >= self._write_interval * random.uniform(1.0, 1.2)
            if due or reported is None or _matters(reported, answer):
                reported, reported_at = answer, now
                self._news(key)
            # Spread jobs that started together over the interval.
            wait = pace(self._interval, len(self._tasks)) * random.uniform(0.8, 1.2)
            await asyncio.sleep(together(time.monotonic(), wait))

    async def _ask(self, target: ScrapeTarget) -> Scrape:
        at = self._clock()
        try:
            async with asyncio.timeout(SECONDS):
                text = await self._get(target)
            progress = Progress.from_json(text)
        except (TimeoutError, HTTPException, aiohttp.ClientError, ApiError, Unreachable, OSError) as error:
            why = f"timed out after {SECONDS:.0f} s" if isinstance(error, TimeoutError) else _brief(error)
            self.failures += 1
            return Scrape(at=at, child=target.child, error=f"{target.pod}: no /status response: {why}")
        except (ValidationError, ValueError) as error:
            self.failures += 1
            count = error.error_count() if isinstance(error, ValidationError) else 1
            return Scrape(at=at, child=target.child, error=f"{target.pod}: invalid /status response ({count} errors)")
        self.answers += 1
        return Scrape(at=at, child=target.child, progress=progress)

    async def _get(self, target: ScrapeTarget) -> bytes:
        if target.https and (self._way == "api-proxy" or self._trust is None):
            raise HTTPException("the pod asks for a token, which the API server's proxy does not pass on")
        if self._way == "api-proxy":
            path = f"/api/v1/namespaces/{target.namespace}/pods/{target.pod}:{target.port}/proxy/status"
            return await self._client.raw(path, MAX_BYTES)
        if not target.ip:
            raise HTTPException("the pod has no IP address")
        return await fetch(target.ip, target.port, self._trust if target.https else None)


class _Received:
    """The bytes of a response, in the form that http.client reads."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


async def fetch(ip: str, port: int, trust: Trust | None = None) -> bytes:
    """GET /status at an address and return the body. Raises OSError and HTTPException; the caller sets a time limit.

    trust: ask by HTTPS with the token, which is sent only after the certificate has been checked.
    Each request opens a new connection, since a thousand idle ones would cost more than they save. Proxies, cookies,
    redirects and compression are not supported, so a request takes a third of the CPU time of a general client.
    """
    host = f"[{ip}]" if ":" in ip else ip
    if trust is None:
        authorization = ""
        reader, writer = await asyncio.open_connection(ip, port)
    else:
        authorization = f"Authorization: Bearer {trust.token()}\r\n"
        reader, writer = await asyncio.open_connection(ip, port, ssl=trust.context(), server_hostname=trust.server_name)
    try:
        writer.write(
            f"GET /status HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: application/json\r\n{authorization}"
            "Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        received = bytearray()
        while part := await reader.read(MAX_BYTES):
            received += part
            if len(received) > MAX_BYTES + MAX_HEAD_BYTES:
                raise HTTPException(f"the response is larger than {MAX_BYTES} bytes")
    finally:
        writer.transport.abort()
    # http.client only calls makefile on its socket.
    answer = HTTPResponse(_Received(bytes(received)))  # type: ignore[arg-type]
    answer.begin()
    if answer.status != 200:
        raise HTTPException(f"HTTP {answer.status}")
    body = answer.read()
    if len(body) > MAX_BYTES:
        raise HTTPException(f"the response is larger than {MAX_BYTES} bytes")
    return body


def _matters(old: Scrape, new: Scrape) -> bool:
    """Whether a change should be reported at once, unlike one more step."""
    if (old.progress is None) != (new.progress is None):
        return True
    if old.progress is None or new.progress is None:
        return False
    return (
        old.progress.phase != new.progress.phase
        or old.progress.attempt != new.progress.attempt
        or old.progress.slow_rank != new.progress.slow_rank
        or (old.progress.step == 0) != (new.progress.step == 0)
    )


def _brief(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:200]
