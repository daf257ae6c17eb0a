"""Compares the caches with the cluster regularly: finds dead watches, restarts them and adds what they missed.

A watch can hang without an error, and on a quiet cluster silence proves nothing. So every few minutes each kind is
listed, metadata only and page by page. If the cluster has had a change for a while and no watch has delivered it, the
watch is dead: the watches are restarted, and if that does not help, the liveness probe fails. In both cases the missing
changes are added to the cache, so that jobs continue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from dpo_operator.runtime.cache import Cache, Key, job_of, version
from dpo_operator.runtime.client import METADATA_ONLY, ApiError, Client, Unreachable
from dpo_operator.runtime.resources import Resource

_GATHER_SECONDS = 3.0
"""Seconds between a request for a comparison and the comparison."""

_log = logging.getLogger(__name__)

_Suspect = tuple[Resource, str, int]
"""Kind, UID and the version that a watch delivered last, which stays the same while the watch is dead."""


@dataclass
class Health:
    """What probes and metrics read."""

    synced: bool = False
    """Whether the caches were complete at least once. Never reset: a pass checks the API server before it acts."""
    dead: frozenset[str] = frozenset()
    """Plural names of the kinds whose watch is dead."""
    checked_at: float | None = None
    """When all kinds were last compared, Unix seconds."""
    errors: int = 0
    missing: frozenset[str] = field(default_factory=frozenset)
    """Plural names of kinds that the cluster does not know."""


class Watchdog:
    """Runs until cancelled. ``changed`` is called with each DPOJob whose cache entry was repaired."""

    def __init__(
        self,
        client: Client,
        cache: Cache,
        namespaces: Collection[str],
        changed: Callable[[Key], None],
        revive: Callable[[str], Awaitable[None]],
        *,
        interval: float,
        dead_after: float,
    ) -> None:
        """``interval``: seconds between comparisons. ``dead_after``: seconds of silence after which a watch is dead.

        ``revive`` restarts the watches and gets the reason; it is called after half of that time.
        """
        self._client = client
        self._cache = cache
        self._scopes: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._changed = changed
        self._revive = revive
        self._revived = float("-inf")
        self._asked = asyncio.Event()
        self._took = 0.0
        self._interval = interval
        self._dead_after = dead_after
        self._suspects: dict[_Suspect, float] = {}
        self.health = Health()
        self.resources: tuple[Resource, ...] = ()
        """The kinds that are watched now."""

    async def run(self) -> None:
        """Compare until cancelled: often until the caches are filled, then rarely."""
        while True:
            start = time.monotonic()
            try:
                agrees = await self.compare()
            except (ApiError, Unreachable) as error:
                # An unavailable API server shows nothing about the watches.
                self.health.errors += 1
                self._suspects.clear()  # the watches could not work either: start their time again
                _log.info("could not compare the caches with the cluster: %s", error)
                agrees = False
            if agrees and not self.health.synced:
                self.health.synced = True
                _log.info("caches synced: %d DPOJobs", len(self._cache.job_keys()))
                for key in self._cache.job_keys():
                    self._changed(key)
            self._took = time.monotonic() - start
            # Requests come in bursts: one comparison serves them all.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait()):
                    await self._asked.wait()
                    await asyncio.sleep(_GATHER_SECONDS)
            self._asked.clear()

    def soon(self) -> None:
        """Compare soon: the watches were interrupted, and no watch reports what was deleted in that time."""
        self._asked.set()

    def _wait(self) -> float:
        if not self.health.synced:
            return max(0.5, 2 * self._took)  # most of the time is for the lists themselves
        if self._suspects:
            # A second comparison shows whether a watch is dead or was only slower than this list.
            return min(self._interval, self._dead_after / 2)
        return self._interval

    async def compare(self) -> bool:
        """Compare once; return whether the watches have delivered everything."""
        if not self.resources:
            return False
        suspects: set[_Suspect] = set()
        for resource in self.resources:
            gone = self._cache.unkept(resource)
            for scope in self._scopes:
                suspects |= await self._compare(resource, scope, gone)
            if suspects and not self.health.synced:
                break
            self._cache.forget(resource, gone)
        now = time.monotonic()
        self._suspects = {suspect: self._suspects.get(suspect, now) for suspect in suspects}
        dead = {s[0].plural for s, since in self._suspects.items() if now - since >= self._dead_after}
        for plural in sorted(dead - self.health.dead):
            _log.error("the watch of %s is dead: the cluster has changes that it did not deliver", plural)
        self.health.dead = frozenset(dead)
        self.health.checked_at = time.time()
        await self._revive_silent(now)
        return not suspects

    async def _revive_silent(self, now: float) -> None:
        """Restart watches that have been silent for half of ``dead_after``; then give them time to catch up."""
        due = {s[0].plural for s, since in self._suspects.items() if now - since >= self._dead_after / 2}
        if due and self.health.synced and now - self._revived >= self._dead_after:
            self._revived = now
            await self._revive(f"changes of {', '.join(sorted(due))} were not delivered")

    async def _compare(self, resource: Resource, scope: str | None, gone: set[str]) -> set[_Suspect]:
        """Compare the objects of a namespace; take the UIDs that it has out of ``gone``."""
        missing = {k: uid for k, uid in self._cache.known(resource).items() if scope in {None, k[0]}}
        suspects: set[_Suspect] = set()
        async for page in self._client.pages(resource, scope, accept=METADATA_ONLY):
            for item in page:
                metadata = item["metadata"]
                key, uid = (metadata["namespace"], metadata["name"]), metadata["uid"]
                gone.discard(uid)
                if missing.get(key) == uid:
                    del missing[key]
                seen = self._cache.seen(resource, uid)
                if seen >= version(item):
                    continue
                suspects.add((resource, uid, seen))
                if not self.health.synced:
                    # The first lists are on their way, in this order. A watch is dead if it does not get past this one.
                    return suspects
                await self._repair(resource, item)
        for key, uid in missing.items():
            suspects |= await self._remove(resource, key, uid)
        return suspects

    async def _repair(self, resource: Resource, item: dict[str, Any]) -> None:
        """Read an object that no watch delivered: the list has only its metadata."""
        if job_of(resource, item) is None:
            return
        found = await self._read(resource, (item["metadata"]["namespace"], item["metadata"]["name"]))
        if found is not None:
            key = self._cache.put(resource, found, watched=False)
            if key is not None:
                self._changed(key)

    async def _read(self, resource: Resource, key: Key) -> dict[str, Any] | None:
        """Read one object with a list request: the operator may list pods but not get them."""
        params = {"fieldSelector": f"metadata.name={key[1]}"}
        page = await self._client.request("GET", resource.path(key[0]), params=params)
        return next(iter(page.get("items") or ()), None)

    async def _remove(self, resource: Resource, key: Key, uid: str) -> set[_Suspect]:
        """Remove what the cluster no longer has from the cache, unless it was created after the list."""
        if self._cache.uid(resource, key) != uid:
            return set()
        found = await self._read(resource, key)
        if found is not None and found["metadata"]["uid"] == uid:
            return set()
        # kopf never reports what was deleted while its watch was down, so this alone does not make a watch dead.
        job = self._cache.remove(resource, *key, uid)
        if job is not None:
            self._changed(job)
        return set()
