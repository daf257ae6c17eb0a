"""The operator as a whole: what is started, in which order, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from pathlib import Path
from typing import Any, Literal

from dpo_api.version import VERSION
from dpo_operator.config import Settings
from dpo_operator.runtime import login
from dpo_operator.runtime.authentication import Gate
from dpo_operator.runtime.cache import Cache, Key
from dpo_operator.runtime.client import ApiError, Client, Unreachable
from dpo_operator.runtime.metrics import Metrics
from dpo_operator.runtime.options import Options
from dpo_operator.runtime.queue import WorkQueue
from dpo_operator.runtime.resources import CHILDREN, JOBS, WATCHED, Resource
from dpo_operator.runtime.scraper import Scraper
from dpo_operator.runtime.server import Certificate, serve
from dpo_operator.runtime.trust import Trust
from dpo_operator.runtime.watchdog import Watchdog
from dpo_operator.runtime.watches import Watches
from dpo_operator.runtime.worker import Worker

_DISCOVERY_SECONDS = 5.0

_log = logging.getLogger(__name__)


def way_to_trainers(options: Options) -> Literal["pod-ip", "api-proxy", "off"]:
    """Return how trainers are asked for progress: what ``--scrape-by=auto`` means here. After ``login.use``."""
    if options.scrape_by == "auto":
        return "pod-ip" if login.in_cluster() else "api-proxy"
    return options.scrape_by


def _certificate(options: Options) -> Certificate | None:
    """Raises ConfigurationError for files that cannot be used."""
    if not options.tls_cert_file:
        return None
    try:
        return Certificate(Path(options.tls_cert_file), Path(options.tls_key_file))
    except OSError as error:
        files = f"--tls-cert-file={options.tls_cert_file}, --tls-key-file={options.tls_key_file}"
        raise ConfigurationError(f"{files}: {error}; give a certificate and its key in PEM") from error


class ConfigurationError(Exception):
    """The operator cannot start with these flags."""


class Operator:
    """The operator's process. ``run`` returns after SIGTERM or SIGINT."""

    def __init__(self, options: Options, settings: Settings) -> None:
        """Create and connect all parts; nothing is started yet."""
        self._options = options
        # Before anything is started: a wrong file ends the process with one line.
        self._certificate = _certificate(options)
        login.use(options.kubeconfig)
        self._client = Client(login.connection, user_agent=f"dpo-operator/{VERSION}")
        self._cache = Cache(settings)
        self._queue: WorkQueue[Key] = WorkQueue(clock=time.monotonic)
        self._watches = Watches(login.connection, options.namespaces, self._hear)
        self._watchdog = Watchdog(
            self._client, self._cache, options.namespaces, self._queue.add, self._watches.restart,
            interval=options.relist_seconds, dead_after=options.dead_watch_seconds,
        )  # fmt: skip
        self.health = self._watchdog.health
        self._scraper = Scraper(
            self._client, way_to_trainers(options), self._queue.add,
            interval=options.scrape_seconds, write_interval=settings.progress_write_seconds,
            trust=Trust(Path(options.trainer_metrics_folder), options.trainer_metrics_server_name),
        )  # fmt: skip
        self._metrics = Metrics(self._cache.jobs, self._gauges, job_limit=options.job_metrics_limit)
        self._worker = Worker(
            self._client, self._cache, self._queue, self._scraper, self._metrics, settings,
            ready=lambda: self.health.synced, backend_installed=lambda: CHILDREN.plural not in self.health.missing,
        )  # fmt: skip

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        runner, port = await serve(
            self._options.address, self._options.port, metrics=self._metrics.text, alive=self.alive, ready=self.ready,
            certificate=self._certificate, gate=Gate(self._client) if self._options.metrics_auth == "token" else None,
        )  # fmt: skip
        where = ", ".join(self._options.namespaces) or "all namespaces"
        _log.info("dpo-operator %s watches %s; metrics and probes on port %d", VERSION, where, port)
        tasks = [asyncio.create_task(self._discover(), name="discovery")]
        if self._certificate is not None:
            tasks += [asyncio.create_task(self._certificate.watch(), name="certificate")]
        tasks += [asyncio.create_task(self._watchdog.run(), name="watchdog")]
        tasks += [asyncio.create_task(self._worker.run(), name=f"worker {n}") for n in range(self._options.workers)]
        stopped = asyncio.create_task(stop.wait(), name="stop")
        try:
            done, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()  # none of them returns by itself: raise the error that ended it
        finally:
            # A pass that is cut short is repeated by the next process; nothing here needs a grace period.
            for task in (*tasks, stopped):
                task.cancel()
            await asyncio.gather(*tasks, stopped, return_exceptions=True)
            await self._scraper.close()
            await self._watches.stop()
            await runner.cleanup()
            await self._client.close()
        _log.info("stopped")

    async def _discover(self) -> None:
        """Watch the kinds that the cluster serves, and check regularly for the missing ones."""
        served: tuple[Resource, ...] = ()
        failures = self._watches.failures
        while True:
            with contextlib.suppress(Unreachable):
                missing = frozenset([r.plural for r in WATCHED if not await self._knows(r)])
                for plural in sorted(missing - self.health.missing):
                    _log.warning("the cluster has no %s; waiting for the CustomResourceDefinition", plural)
                for plural in sorted(self.health.missing - missing):
                    _log.info("the cluster has %s now", plural)
                self.health.missing = missing
                found = tuple(r for r in WATCHED if r.plural not in missing)
                if found != served:
                    for gone in set(served) - set(found):
                        self._cache.clear(gone)
                    self.health.synced = False
                    self._watchdog.resources = found if JOBS in found else ()
                    await self._watches.serve(found)
                    served = found
                    for key in self._cache.job_keys():
                        self._queue.add(key)
            # If the CRD of a kind is deleted, its watch fails.
            for _ in range(60):
                await asyncio.sleep(_DISCOVERY_SECONDS)
                if self.health.missing or self._watches.failures != failures:
                    break
            if self._watches.failures != failures:
                failures = self._watches.failures
                self._watchdog.soon()

    async def _knows(self, resource: Resource) -> bool:
        try:
            listed = await self._client.request("GET", resource.api)
        except ApiError as error:
            if error.status == 404:
                return False
            # A refusal or an error does not show that the kind is missing, so keep watching it.
            raise Unreachable(str(error)) from error
        return any(kind.get("name") == resource.plural for kind in listed.get("resources") or ())

    # -- news ---------------------------------------------------------------------------------------------------------

    def _hear(self, resource: Resource, kind: str | None, item: dict[str, Any]) -> None:
        if kind == "DELETED":
            key = self._cache.deleted(resource, item)
        else:
            if kind is None and self.health.synced:
                self._watchdog.soon()  # a new list: kopf does not report what was deleted meanwhile
            key = self._cache.put(resource, item, watched=True)
        if key is not None:
            self._queue.add(key)

    # -- probes -------------------------------------------------------------------------------------------------------

    def alive(self) -> str:
        """Return why this process should be restarted: a dead watch, never an API server that is away."""
        if self.health.dead:
            return f"dead watch: {', '.join(sorted(self.health.dead))}"
        return ""

    def ready(self) -> str:
        """Return why the caches cannot be relied on yet."""
        if JOBS.plural in self.health.missing:
            return "the cluster has no dpojobs: install the CustomResourceDefinition"
        return "" if self.health.synced else "the caches are not synced yet"

    def _gauges(self) -> dict[str, float]:
        gauges: dict[str, float] = {
            "dpo_operator_queue_depth": self._queue.depth,
            "dpo_operator_queue_oldest_seconds": self._queue.oldest(),
            "dpo_operator_watches_dead": len(self.health.dead),
            "dpo_operator_watch_restarts": self._watches.failures,
            "dpo_operator_synced": float(self.health.synced),
            "dpo_operator_backend_installed": float(CHILDREN.plural not in self.health.missing),
            "dpo_operator_scrape_failures": self._scraper.failures,
        }
        if self.health.checked_at is not None:
            gauges["dpo_operator_watch_checked_timestamp_seconds"] = self.health.checked_at
        return gauges
