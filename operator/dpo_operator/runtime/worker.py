"""One pass over one DPOJob: observe, decide, act, and repeat while the actions return new information."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from dpo_operator.config import Settings
from dpo_operator.labels import ATTEMPT, JOB, JOB_UID
from dpo_operator.reconcile import reconcile
from dpo_operator.runtime.cache import Cache, Key, trimmed
from dpo_operator.runtime.client import ApiError, Client, Unreachable
from dpo_operator.runtime.metrics import Metrics
from dpo_operator.runtime.performer import Outdated, Performer
from dpo_operator.runtime.queue import WorkQueue
from dpo_operator.runtime.resources import CHILDREN, JOBS, PODS, Resource
from dpo_operator.runtime.scraper import Scraper
from dpo_operator.runtime.words import Words
from dpo_operator.types import (
    CreateChild,
    CreateNetworkPolicy,
    Decision,
    DeleteChild,
    DeleteJob,
    EmitEvent,
    Object,
    Observed,
    PatchStatus,
)

_ROUNDS = 8
"""Most rounds of one pass; more mean that the job changes as fast as it is read."""

_FOREVER = float("inf")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recent:
    """What this process did for a job just before."""

    written: float | None = None
    """When it last wrote the job's status, Unix seconds."""
    network_policy: Object | None = None
    """The one that it has created since then."""


class Unsettled(Exception):  # noqa: N818 - not an error: the pass is repeated
    """Every round of a pass returned new information."""


class Worker:
    """Processes the queue. Any number of ``run`` calls may be active at once."""

    def __init__(
        self,
        client: Client,
        cache: Cache,
        queue: WorkQueue[Key],
        scraper: Scraper,
        metrics: Metrics,
        settings: Settings,
        *,
        ready: Callable[[], bool],
        backend_installed: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``ready``: whether the caches are filled; no pass runs before."""
        self._client = client
        self._cache = cache
        self._queue = queue
        self._scraper = scraper
        self._metrics = metrics
        self._settings = settings
        self._resync = settings.resync_seconds
        self._ready = ready
        self._backend_installed = backend_installed
        self._clock = clock
        self._performer = Performer(client, cache)
        self._words = Words(client)
        self._recent: dict[Key, _Recent] = {}
        """By job that is not over."""

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            key = await self._queue.get()
            if not self._ready():
                self._queue.done(key)  # the watchdog adds every job once the caches are filled
                continue
            await self._handle(key)

    async def _handle(self, key: Key) -> None:
        said = {"job": f"{key[0]}/{key[1]}"}
        try:
            with self._metrics.pass_time():
                wake = await self._pass(key)
        except Outdated:
            # Not a failure: the next pass sees what made the decision void.
            self._queue.done(key, again_in=0.0)
        except (ApiError, Unreachable) as error:
            self._metrics.error(str(error.status) if isinstance(error, ApiError) else "unreachable")
            wait = self._queue.failed(key, at_least=getattr(error, "retry_after", None) or 0.0)
            _log.info("reconcile will be retried in %.1f s: %s", wait, error, extra=said)
        except Unsettled:
            self._metrics.error("unsettled")
            self._queue.failed(key)
        except asyncio.CancelledError:
            raise
        except Exception:  # noqa: BLE001 - a bug delays this job and must not affect other jobs
            self._metrics.error("exception")
            wait = self._queue.failed(key)
            _log.exception("reconcile failed and will be retried in %.1f s", wait, extra=said)
        else:
            if wake is None:
                self._queue.done(key)
                self._queue.forget(key)
            else:
                self._queue.done(key, again_in=min(wake, self._resync))

    async def _pass(self, key: Key) -> float | None:
        """Run one pass; return the seconds until the next, or None if only a change matters: the job is gone or over.

        Of a job that is over only a record is kept. The pass reads its objects again if there is something to do.
        """
        rest = self._rest(key)
        if rest > 0:
            return None if rest == _FOREVER else rest
        certain = self._cache.is_partial(key)
        if certain:
            await self._read(key)
        job = self._cache.job(key)
        if job is None:
            self._scraper.aim(key, None)
            self._words.forget(key)
            self._recent.pop(key, None)
            self._cache.processed(key, self._cache.departed(key))
            return None
        observed = await self._observe(key, job)
        later: tuple[EmitEvent, ...] = ()
        for _ in range(_ROUNDS):
            decision = reconcile(observed, self._clock(), self._settings)
            if not certain and _is_weighty(decision, observed.job):
                # A cache may lag, and kinds differ: a PyTorchJob may be over while its pods' termination messages are
                # missing. What cannot be undone is decided on what the API server returns now.
                observed, certain = await self._look(key, observed), True
                continue
            news = await self._performer.perform(key, observed, (*later, *decision.actions))
            later = decision.later
            if news is None:
                self._note(key, decision)
            if news is None and decision.follow and (stored := self._cache.job(key)) is not None:
                news = replace(observed, job=stored, check=None, written=self._recent.get(key, _Recent()).written)
            if news is None:
                self._settle(key, job, decision)
                if not decision.delayed:
                    self._cache.processed(key, observed.pods)
                return self._next(key, observed, decision)
            # A PyTorchJob that was found may have ended since its pods were read.
            certain = certain and news.children == observed.children
            observed = news
        raise Unsettled

    def _rest(self, key: Key) -> float:
        """Return the seconds for which nothing is to do about a DPOJob that is over; 0 for any other."""
        record = self._cache.record(key)
        if record is None or self._cache.is_woken(key):
            return 0.0
        return _FOREVER if record.expires is None else max(0.0, record.expires - self._clock())

    def _next(self, key: Key, observed: Observed, decision: Decision) -> float | None:
        """Return the seconds until the next pass; forget what is not needed before."""
        if decision.status.get("completionTime") and not decision.actions:
            expires = None if decision.wake is None else self._clock() + decision.wake
            if self._cache.settle(key, observed.job, observed.children, expires):
                self._words.forget(key)
                self._recent.pop(key, None)
                return decision.wake
        wake = self._resync if decision.wake is None else decision.wake
        children, pods = self._cache.of_job(CHILDREN, key), self._cache.of_job(PODS, key)
        return min(wake, self._words.due(key, children, pods))

    async def _read(self, key: Key) -> Object | None:
        """Read the DPOJob, its children and its pods into the cache; return the DPOJob, None if it is gone."""
        job = await self._client.find(JOBS, *key)
        if job is None:
            self._cache.remove(JOBS, *key, self._cache.uid(JOBS, key) or "")
            return None
        self._cache.open(key, job)
        # PyTorchJobs before pods: then the pods show whatever the PyTorchJob's status reports.
        for resource in (CHILDREN, PODS):
            await relist(self._client, self._cache, resource, key)
        self._cache.complete(key)
        return trimmed(JOBS, job)

    def _note(self, key: Key, decision: Decision) -> None:
        """Remember what the next pass needs to know of a decision that was performed."""
        for action in decision.actions:
            if isinstance(action, PatchStatus):
                self._recent[key] = _Recent(self._clock())
            elif decision.delayed and isinstance(action, CreateNetworkPolicy):
                self._recent[key] = replace(self._recent[key], network_policy=action.body)

    def _settle(self, key: Key, job: Object, decision: Decision) -> None:
        known = any(attempt.get("lastStep") for attempt in decision.status.get("attempts", [])[-1:])
        self._scraper.aim(key, decision.scrape, known=known)
        self._metrics.transition(job.get("status") or {}, decision.status)

    async def _observe(self, key: Key, job: Object) -> Observed:
        recent = self._recent.get(key, _Recent())
        observed = Observed(
            job=job,
            children=tuple(self._cache.of_job(CHILDREN, key)),
            pods=self._pods(key, job),
            scrape=self._scraper.newest(key),
            backend_installed=self._backend_installed(),
            written=recent.written,
            network_policy=recent.network_policy,
        )
        return replace(observed, events=await self._words.about(key, observed))

    async def _look(self, key: Key, observed: Observed) -> Observed:
        """Read the DPOJob, its children and its pods from the API server, into the cache too."""
        job = await self._read(key)
        if job is None:
            raise Outdated
        return replace(
            observed,
            job=job,
            children=tuple(self._cache.of_job(CHILDREN, key)),
            pods=self._pods(key, job),
        )

    def _pods(self, key: Key, job: Object) -> tuple[Object, ...]:
        """Return a DPOJob's pods, those included that were deleted since the last pass."""
        pods = self._cache.of_job(PODS, key)
        there = {pod["metadata"]["uid"] for pod in pods}
        for pod in self._cache.departed(key):
            metadata = pod["metadata"]
            if (metadata.get("labels") or {}).get(JOB_UID) != job["metadata"]["uid"]:
                self._cache.processed(key, [pod])  # of a deleted job of the same name
            elif metadata["uid"] not in there:
                pods.append(pod)
        return tuple(pods)


async def relist(client: Client, cache: Cache, resource: Resource, key: Key) -> None:
    """Read a DPOJob's children or pods from the API server into the cache. Watches go on meanwhile."""
    before = cache.uids(resource, key)
    items: list[Object] = []
    async for page in client.pages(resource, key[0], selector=f"{JOB}={key[1]}"):
        items += page
    cache.replace(resource, key, items, before=before)


def _is_weighty(decision: Decision, job: Object) -> bool:
    """Whether a decision cannot be undone: it ends an attempt, starts the next one, or deletes something."""
    for action in decision.actions:
        if isinstance(action, DeleteChild | DeleteJob):
            return True
        if isinstance(action, CreateChild) and action.body["metadata"]["labels"].get(ATTEMPT) != "1":
            return True
    before = job.get("status") or {}
    if decision.status.get("completionTime") and not before.get("completionTime"):
        return True
    return _results(decision.status) != _results(before)


def _results(status: Object) -> dict[int, str | None]:
    return {a["number"]: a.get("result") for a in status.get("attempts") or () if a.get("result")}
