"""Lists and watches, by kopf. The handlers only pass events on; they decide nothing.

kopf runs in a thread with its own event loop, so that only the watches have to be restarted when it ends. It ends as a
whole when one watch fails permanently, and kopf 1.45 does not always manage even that: a watch that is cancelled while
it connects treats the cancellation as a pause and continues, and ``kopf.operator`` then waits for it forever (the
"Exception in callback request_cancel_callback" of its log). So its tasks are watched and cancelled here. No timer,
daemon or delete handler is registered: kopf writes nothing to any object, neither finalizers nor annotations, so it can
be abandoned at any time.

kopf reads a list faster than it passes its objects on, keeps something about every object that it has passed on, and
needs a millisecond of CPU time to pass one on. So objects are taken from its responses before it sees them: the pages
of lists, of which the next one is read when the cache has taken the last one, and the events of watches. kopf sees
empty pages, and bookmarks, which say from which version on it has to watch again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from typing import Any, cast

import aiohttp
import kopf
from yarl import URL

from dpo_operator.runtime.resources import Resource

Hear = Callable[[Resource, str | None, dict[str, Any]], None]
"""Called in the main loop with the kind, the event's type (None while listing) and the object."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds before the watches are restarted; doubled each time they end soon afterwards."""

_STEADY_SECONDS = 60.0
"""After watches that lasted this long, the next delay is the first one again."""

_AT_ONCE = 50
"""Objects of a list that the main loop takes in one step."""

_log = logging.getLogger(__name__)

_CHANGES = frozenset({"ADDED", "MODIFIED", "DELETED"})

_Event = tuple[str | None, dict[str, Any]]
"""The type, None for an object of a list, and the object."""

_Take = Callable[[Resource, list[_Event]], Awaitable[None]]


class _Backoffs:
    """Delays between retries of kopf's own requests. They never end, since an unavailable API server comes back."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1, 1, 2, 3, 5, 8)
        while True:
            yield 10.0


class _Bookmarks:
    """The body of a watch as kopf sees it: the events are taken, and only their versions are left."""

    def __init__(self, content: aiohttp.StreamReader, take: Callable[[list[_Event]], Awaitable[None]]) -> None:
        self._content = content
        self._take = take

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        """Yield whole lines, and what the end of the connection left of the last one."""
        rest = b""
        async for data in self._content.iter_chunked(size):
            *lines, rest = (rest + data).split(b"\n")
            seen = await self._without_changes(lines)
            if seen:
                yield seen
        if rest:
            yield rest

    async def _without_changes(self, lines: Iterable[bytes]) -> bytes:
        """Take the events that change an object, and return a bookmark in their place, and the other events."""
        taken: list[_Event] = []
        left: list[bytes] = []
        version = None
        for line in filter(None, lines):
            event = json.loads(line)
            if event.get("type") in _CHANGES:
                taken.append((event["type"], event["object"]))
                version = event["object"]["metadata"]["resourceVersion"]
            else:
                left += [*_bookmark(version), line]
                version = None
        if taken:
            await self._take(taken)
        return b"".join(line + b"\n" for line in (*left, *_bookmark(version)))


def _bookmark(version: str | None) -> list[bytes]:
    """Return the line that tells kopf the version up to which it has seen everything; none without a version."""
    if version is None:
        return []
    return [json.dumps({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": version}}}).encode()]


def _responses(resources: tuple[Resource, ...], take: _Take) -> type[aiohttp.ClientResponse]:
    """Return the class of responses that hand the objects of lists and watches to ``take`` and show kopf none."""

    def watched(url: URL) -> Resource | None:
        for resource in resources:
            if url.path.endswith(f"/{resource.plural}") and f"{resource.api}/" in url.path:
                return resource
        return None

    class Response(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> aiohttp.ClientResponse:
            await super().start(connection)
            resource = watched(self.url)
            if resource is not None and self.status == 200 and self.url.query.get("watch") == "true":
                events = _Bookmarks(self.content, functools.partial(take, resource))
                self.content = cast("aiohttp.StreamReader", events)
            return self

        async def json(self, **options: Any) -> Any:
            found = await super().json(**options)
            resource = watched(self.url)
            if resource is not None and isinstance(found, dict) and found.get("items"):
                items, found["items"] = found["items"], []
                await take(resource, [(None, item) for item in items])
            return found

    return Response


def _session(info: kopf.ConnectionInfo, responses: type[aiohttp.ClientResponse]) -> kopf.AiohttpSession:
    """Return what kopf would make of credentials, with a class of responses."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
        headers=info.as_http_headers(),
        proxy=info.proxy_url,
        trust_env=bool(info.trust_env),
        response_class=responses,
    )
    return kopf.AiohttpSession(
        server=str(info.server), default_namespace=info.default_namespace, aiohttp_session=session,
        priority=info.priority, expiration=info.expiration,
    )  # fmt: skip


def _nothing() -> None:
    """Do nothing."""


def _note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error outside any task at debug level: if it ends a watch, that is noticed elsewhere."""
    _log.info("kopf: %s: %r", context.get("message"), context.get("exception"))


def _reason(done: Iterable[asyncio.Future[Any]]) -> str:
    """Return in one line why kopf's tasks ended."""
    for task in done:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            return f"{type(error).__name__}: {error}"
    return "kopf ended"


async def _drop_tasks() -> None:
    """Cancel every other task of this loop, more than once: some of kopf's swallow a cancellation."""
    for _ in range(20):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=0.2)
    _log.info("%d kopf tasks ignored their cancellation and are abandoned", len(tasks))


class Watches:
    """The watches of some kinds, in some namespaces or in all. Started once; ``serve`` may change the kinds."""

    def __init__(
        self,
        login: Callable[[], kopf.ConnectionInfo],
        namespaces: Collection[str],
        hear: Hear,
    ) -> None:
        """``hear`` is called in the loop that runs when ``serve`` is called."""
        self._login = login
        self._namespaces = tuple(namespaces)
        self._hear = hear
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._end: Callable[[], None] = _nothing
        self._changing = asyncio.Lock()
        self._resources: tuple[Resource, ...] = ()
        self.failures = 0
        """How often the watches were restarted because they had ended or were dead."""

    async def serve(self, resources: Collection[Resource]) -> None:
        """Watch exactly these kinds from now on."""
        async with self._changing:
            await self._start(tuple(resources))

    async def restart(self, reason: str) -> None:
        """Abandon the watches in whatever state they are, and restart them with full lists."""
        async with self._changing:
            if self._thread is None:
                return
            self.failures += 1
            _log.warning("restarting watches: %s", reason)
            await self._start(self._resources)

    async def stop(self) -> None:
        """End the watches."""
        async with self._changing:
            await self._halt()

    async def _start(self, resources: tuple[Resource, ...]) -> None:
        await self._halt()
        self._resources, self._stop = resources, threading.Event()
        arguments = (resources, asyncio.get_running_loop(), self._stop)
        self._thread = threading.Thread(target=self._run, args=arguments, name="watches", daemon=True)
        self._thread.start()

    async def _halt(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            self._end()
            # A thread that hangs must not block this process or its successor: it is a daemon and is now ignored.
            await asyncio.to_thread(thread.join, 10.0)

    def _run(self, resources: tuple[Resource, ...], loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        wait = _FIRST_WAIT
        while not stop.is_set():
            began = time.monotonic()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reason = self._live(resources, loop, stop)
            except Exception as error:  # noqa: BLE001 - the watches are restarted after any error
                reason = f"{type(error).__name__}: {error}"
            if stop.is_set():
                return
            if time.monotonic() - began > _STEADY_SECONDS:
                wait = _FIRST_WAIT
            self.failures += 1
            _log.warning("restarting watches in %.1f s: %s", wait, reason)
            stop.wait(wait)
            wait = min(_LONGEST_WAIT, wait * 2)

    def _live(self, resources: tuple[Resource, ...], loop: asyncio.AbstractEventLoop, stop: threading.Event) -> str:
        """Run kopf until it ends or is stopped; return why it ended."""
        inner = asyncio.new_event_loop()
        inner.set_exception_handler(_note)
        try:
            return inner.run_until_complete(self._operate(resources, loop, stop))
        finally:
            # Not asyncio.run: it would wait for every task, also for those that never end.
            inner.close()

    async def _operate(
        self, resources: tuple[Resource, ...], loop: asyncio.AbstractEventLoop, stop: threading.Event
    ) -> str:
        stopped, inner = asyncio.Event(), asyncio.get_running_loop()

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                inner.call_soon_threadsafe(stopped.set)

        self._end = end
        if stop.is_set():
            return "stopped"
        try:
            tasks = await kopf.spawn_tasks(
                registry=self._registry(resources, loop, stop),
                settings=self._settings(resources),
                standalone=True,
                clusterwide=not self._namespaces,
                namespaces=self._namespaces,
            )
            # kopf's tasks run forever: if one ends, the watches have ended.
            ends = {*tasks, asyncio.ensure_future(stopped.wait())}
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return _reason(done)
        finally:
            await _drop_tasks()

    def _registry(
        self, resources: tuple[Resource, ...], loop: asyncio.AbstractEventLoop, stop: threading.Event
    ) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        async def take(resource: Resource, events: list[_Event]) -> None:
            for part in itertools.batched(events, _AT_ONCE):
                if not stop.is_set():
                    await self._give(loop, resource, part)

        responses = _responses(resources, take)

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.AiohttpSession:
            return _session(await asyncio.to_thread(self._login), responses)

        async def never(**_: Any) -> None:
            """Is not called, since kopf sees no objects; it watches only kinds that have a handler."""

        for resource in resources:
            kopf.on.event(
                group=resource.group, version=resource.version, plural=resource.plural,
                registry=registry, id=f"never-{resource.plural}",
            )(never)  # fmt: skip
        return registry

    async def _give(self, loop: asyncio.AbstractEventLoop, resource: Resource, events: Iterable[_Event]) -> None:
        """Let the main loop hear objects, and wait until it has."""
        inner = asyncio.get_running_loop()
        heard = asyncio.Event()

        def hear() -> None:
            try:
                for kind, item in events:
                    self._hear(resource, kind, item)
            finally:
                with contextlib.suppress(RuntimeError):  # kopf's loop is closed: it has ended
                    inner.call_soon_threadsafe(heard.set)

        loop.call_soon_threadsafe(hear)
        await heard.wait()

    def _settings(self, resources: tuple[Resource, ...]) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        # Otherwise kopf kills this process some minutes after its watches were cancelled.
        settings.process.ultimate_exiting_timeout = None
        settings.scanning.disabled = True
        settings.networking.error_backoffs = _Backoffs()
        settings.networking.request_timeout = 60.0
        settings.networking.connect_timeout = 5.0
        settings.watching.chunk_size = 250
        settings.watching.server_timeout = 300  # the API server accepts only whole seconds
        settings.watching.reconnect_backoff = 0.5
        # kopf stores nothing in objects; if a later version does, it uses our own names.
        settings.persistence.finalizer = "dpo-operator.dev/finalizer"
        settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix="dpo-operator.dev")
        settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix="dpo-operator.dev")
        for resource in resources:
            if resource.selector:
                settings.watching.label_selectors[resource.group, resource.version, resource.plural] = resource.selector
        return settings
