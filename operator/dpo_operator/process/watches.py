"""kopf's part: lists and watches. Its handlers only pass on what they hear; they decide nothing.

kopf runs in a thread with an event loop of its own, because it ends every task of its loop when a watch fails beyond
repair. Here that costs one restart of the watches, and no work in progress. No timer, daemon or delete handler is
ever registered, so kopf writes nothing to any object: no finalizer, no annotation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import kopf

from dpo_operator.process.resources import Resource

Hear = Callable[[Resource, str | None, dict[str, Any]], None]
"""Called in the main loop with the kind, the event's type (None while listing) and the object."""

_log = logging.getLogger(__name__)


class _Backoffs:
    """Waits between repetitions of kopf's own requests: for ever, since an API server that is away comes back."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1, 1, 2, 3, 5, 8)
        while True:
            yield 10.0


def _nothing() -> None:
    """Do nothing."""


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
        self.failures = 0
        """Times that the watches ended by themselves and were started anew."""

    async def serve(self, resources: Collection[Resource]) -> None:
        """Watch exactly these kinds from now on."""
        await self.stop()
        self._stop = threading.Event()
        loop = asyncio.get_running_loop()
        arguments = (tuple(resources), loop, self._stop)
        self._thread = threading.Thread(target=self._run, args=arguments, name="watches", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the watches."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            self._end()
            # A watch that hangs must not keep the process: the thread is a daemon.
            await asyncio.to_thread(thread.join, 10.0)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, resources: tuple[Resource, ...], loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        wait = 0.5
        while not stop.is_set():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    asyncio.run(self._operate(resources, loop, stop))
                reason = "they ended by themselves"
            except Exception as error:  # noqa: BLE001 - whatever ends the watches, they are needed again
                reason = f"{type(error).__name__}: {error}"
            if stop.is_set():
                return
            self.failures += 1
            _log.warning("the watches are started anew in %.1f s: %s", wait, reason)
            stop.wait(wait)
            wait = min(30.0, wait * 2)

    async def _operate(
        self, resources: tuple[Resource, ...], loop: asyncio.AbstractEventLoop, stop: threading.Event
    ) -> None:
        # A flag of this loop: kopf would wait for a threading.Event in a pool thread that outlives it.
        flag, inner = asyncio.Event(), asyncio.get_running_loop()

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                inner.call_soon_threadsafe(flag.set)

        self._end = end
        if stop.is_set():
            return
        await kopf.operator(
            registry=self._registry(resources, loop),
            settings=self._settings(resources),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=flag,
        )

    def _registry(self, resources: tuple[Resource, ...], loop: asyncio.AbstractEventLoop) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.ConnectionInfo:
            return await asyncio.to_thread(self._login)

        def listen(resource: Resource) -> None:
            @kopf.on.event(
                group=resource.group, version=resource.version, plural=resource.plural,
                registry=registry, id=f"hear-{resource.plural}",
            )  # fmt: skip
            async def hear(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002 - kopf's name
                loop.call_soon_threadsafe(self._hear, resource, type, dict(body))

        for resource in resources:
            listen(resource)
        return registry

    def _settings(self, resources: tuple[Resource, ...]) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        # Else kopf kills this process some minutes after watches that ended by themselves.
        settings.process.ultimate_exiting_timeout = None
        settings.scanning.disabled = True
        settings.networking.error_backoffs = _Backoffs()
        settings.networking.request_timeout = 60.0
        settings.networking.connect_timeout = 5.0
        settings.watching.chunk_size = 500
        settings.watching.server_timeout = 300  # whole seconds: the API server takes no other
        settings.watching.reconnect_backoff = 0.5
        settings.queueing.worker_limit = self._limit
        # A worker of kopf lives on after its last event; hundreds of them are only memory.
        settings.queueing.idle_timeout = 0.5
        settings.queueing.exit_timeout = 0.5
        # Nothing is ever stored in objects; should a later kopf want to, then under our own names.
        settings.persistence.finalizer = "dpo-operator.dev/finalizer"
        settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix="dpo-operator.dev")
        settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix="dpo-operator.dev")
        for resource in resources:
            if resource.selector:
                settings.watching.label_selectors[resource.group, resource.version, resource.plural] = resource.selector
        return settings
