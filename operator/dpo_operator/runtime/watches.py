"""Lists and watches, by kopf. The handlers only pass events on; they decide nothing.

kopf runs in a thread with its own event loop, so that only the watches have to be restarted when it ends. It ends as a
whole when one watch fails permanently, and kopf 1.45 does not always manage even that: a watch that is cancelled while
it connects treats the cancellation as a pause and continues, and ``kopf.operator`` then waits for it forever (the
"Exception in callback request_cancel_callback" of its log). So its tasks are watched and cancelled here. No timer,
daemon or delete handler is registered: kopf writes nothing to any object, neither finalizers nor annotations, so it can
be abandoned at any time.

kopf reads a list faster than it passes its objects on, and keeps something about every object that it has passed on. A
cluster may have a hundred thousand pods of finished jobs, so the pages of lists are taken here, before kopf sees them,
and the next page is read when the cache has taken the last one; kopf remembers nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from typing import Any

import aiohttp
import kopf
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory

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

_Take = Callable[[Resource, list[dict[str, Any]]], Awaitable[None]]


class _Backoffs:
    """Delays between retries of kopf's own requests. They never end, since an unavailable API server comes back."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1, 1, 2, 3, 5, 8)
        while True:
            yield 10.0


class _NoEssence(kopf.AnnotationsDiffBaseStorage):
    """Keeps no copy of each object's last handled state, since no handler here needs the differences."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:  # noqa: ARG002 - kopf's names
        return kopf.BodyEssence({})


class _NoMemories(ResourceMemories):
    """Keeps nothing between two events of an object: 2 KiB for each object that has ever changed."""

    async def recall(self, raw_body: Any, **options: Any) -> ResourceMemory:
        return await super().recall(raw_body, **{**options, "ephemeral": True})


def _pages(resources: tuple[Resource, ...], take: _Take) -> type[aiohttp.ClientResponse]:
    """Return the class of responses that hand the objects of lists to ``take`` and show kopf empty pages."""

    class Page(aiohttp.ClientResponse):
        async def json(self, **options: Any) -> Any:
            found = await super().json(**options)
            path = self.url.path
            for resource in resources:
                is_list = path.endswith(f"/{resource.plural}") and f"{resource.api}/" in path
                if is_list and isinstance(found, dict) and found.get("items"):
                    items, found["items"] = found["items"], []
                    await take(resource, items)
            return found

    return Page


def _session(info: kopf.ConnectionInfo, pages: type[aiohttp.ClientResponse]) -> kopf.AiohttpSession:
    """Return what kopf would make of credentials, with a class of responses."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
        headers=info.as_http_headers(),
        proxy=info.proxy_url,
        trust_env=bool(info.trust_env),
        response_class=pages,
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
        *,
        queue_limit: int = 64,
    ) -> None:
        """``hear`` is called in the loop that runs when ``serve`` is called."""
        self._login = login
        self._namespaces = tuple(namespaces)
        self._hear = hear
        self._limit = queue_limit
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
                memories=_NoMemories(),
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

        async def take(resource: Resource, items: list[dict[str, Any]]) -> None:
            for part in itertools.batched(items, _AT_ONCE):
                if not stop.is_set():
                    await self._give(loop, resource, part)

        pages = _pages(resources, take)

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.AiohttpSession:
            return _session(await asyncio.to_thread(self._login), pages)

        def listen(resource: Resource) -> None:
            @kopf.on.event(
                group=resource.group, version=resource.version, plural=resource.plural,
                registry=registry, id=f"hear-{resource.plural}",
            )  # fmt: skip
            async def hear(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002 - kopf's name
                if not stop.is_set():
                    loop.call_soon_threadsafe(self._hear, resource, type, dict(body))

        for resource in resources:
            listen(resource)
        return registry

    async def _give(self, loop: asyncio.AbstractEventLoop, resource: Resource, items: Iterable[dict[str, Any]]) -> None:
        """Let the main loop hear objects of a list, and wait until it has."""
        inner = asyncio.get_running_loop()
        heard = asyncio.Event()

        def hear() -> None:
            try:
                for item in items:
                    self._hear(resource, None, item)
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
        settings.queueing.worker_limit = self._limit
        # A kopf worker is occupied until its object has been quiet for this long. At 0 it would take no second event.
        settings.queueing.idle_timeout = 0.01
        settings.queueing.exit_timeout = 0.5
        # kopf stores nothing in objects; if a later version does, it uses our own names.
        settings.persistence.finalizer = "dpo-operator.dev/finalizer"
        settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix="dpo-operator.dev")
        settings.persistence.diffbase_storage = _NoEssence(prefix="dpo-operator.dev")
        for resource in resources:
            if resource.selector:
                settings.watching.label_selectors[resource.group, resource.version, resource.plural] = resource.selector
        return settings
