"""Reads the warnings about pods that are not created or do not start: some problems show only in events.

A pass never fails for them. If the API server refuses or throttles such a list, or takes too long, the pass goes on
with the words that are known, and no such list is requested in that namespace for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dpo_operator.runtime.cache import Key
from dpo_operator.runtime.client import ApiError, Client, Unreachable
from dpo_operator.runtime.resources import EVENTS
from dpo_operator.types import Object, Observed

PODS_SECONDS = 3.0
"""Seconds without pods after which the events of a PyTorchJob are read."""

EVENTS_SECONDS = 15.0
"""Seconds between two reads of the events."""

PODS_ASKED = 4
"""Number of pods, of those that have a node but do not start, whose events are read: most share one cause."""

WAIT_SECONDS = 2.0
"""The most that one pass waits for all of its events."""

BACKOFF_SECONDS = (30.0, 600.0)
"""After a list that was refused, throttled or slow: the first and the longest pause in a namespace; it doubles."""

_log = logging.getLogger(__name__)


class Words:
    """The newest known events of each job."""

    def __init__(self, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        """Read through ``client``."""
        self._client = client
        self._clock = clock
        self._known: dict[Key, tuple[float, tuple[Object, ...]]] = {}
        """By job: when its events are due, and the last ones read."""
        self._paused: dict[str, tuple[float, float]] = {}
        """By namespace: until when no events are read, and how long that pause is."""

    def forget(self, key: Key) -> None:
        """Drop what is known about a job."""
        self._known.pop(key, None)

    def due(self, key: Key, children: Iterable[Object], pods: Sequence[Object]) -> float:
        """Return the seconds until a job's events are read, since there may be no other reason for a pass."""
        if key not in self._known:
            # If this pass created the PyTorchJob, its watch delivers nothing new, and refused pods never exist.
            if not any(_lacks_pods(child, pods) for child in children):
                return float("inf")
            self._known[key] = (self._clock() + PODS_SECONDS, ())
        return max(0.1, self._known[key][0] - self._clock())

    async def about(self, key: Key, observed: Observed) -> tuple[Object, ...]:
        """Return the warnings about a job's pods, as far as they are known. Raises nothing of the API server's."""
        selectors = [
            f"involvedObject.uid={child['metadata']['uid']},type=Warning"
            for child in observed.children
            if _lacks_pods(child, observed.pods)
        ]
        waiting = [pod["metadata"]["uid"] for pod in observed.pods if _waits_on_its_node(pod)]
        selectors += [f"involvedObject.uid={uid},type=Warning" for uid in waiting[:PODS_ASKED]]
        if not selectors:
            self.forget(key)
            return ()
        now = self._clock()
        due, words = self._known.setdefault(key, (now + PODS_SECONDS, ()))
        if now < due:
            return words
        until, _ = self._paused.get(key[0], (0.0, 0.0))
        if now >= until:
            words = await self._read(key[0], selectors, words)
            until, _ = self._paused.get(key[0], (0.0, 0.0))
        self._known[key] = (max(now + EVENTS_SECONDS, until), words)
        return words

    async def _read(self, namespace: str, selectors: Sequence[str], words: tuple[Object, ...]) -> tuple[Object, ...]:
        """Return the events of these selectors, or ``words`` and a pause if they can't all be read in time."""
        found: list[Object] = []
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                for selector in selectors:
                    params = {"fieldSelector": selector, "limit": "100"}
                    page: Any = await self._client.request("GET", EVENTS.path(namespace), params=params)
                    found.extend(page.get("items") or ())
        except (ApiError, Unreachable, TimeoutError) as error:
            self._pause(namespace, error)
            return words
        self._paused.pop(namespace, None)
        return tuple(found)

    def _pause(self, namespace: str, error: Exception) -> None:
        first, longest = BACKOFF_SECONDS
        _, former = self._paused.get(namespace, (0.0, 0.0))
        pause = min(longest, max(first, 2 * former))
        wait = max(pause, getattr(error, "retry_after", None) or 0.0)
        self._paused[namespace] = (self._clock() + wait, pause)
        said = str(error) or f"no answer within {WAIT_SECONDS:g} s"
        _log.info("events of namespace %s will be read again in %.0f s: %s", namespace, wait, said)


def _lacks_pods(child: Object, pods: Sequence[Object]) -> bool:
    """Whether a PyTorchJob that is not over has fewer pods than it should, a while after its creation."""
    status = child.get("status") or {}
    if child["metadata"].get("deletionTimestamp") or status.get("completionTime"):
        return False
    if child["spec"].get("runPolicy", {}).get("suspend"):
        return False
    over = {c["type"] for c in status.get("conditions") or () if c["status"] == "True"}
    if over & {"Succeeded", "Failed"}:
        return False
    wanted = sum(int(replica.get("replicas", 1)) for replica in child["spec"]["pytorchReplicaSpecs"].values())
    name = child["metadata"]["name"]
    there = sum((p["metadata"].get("labels") or {}).get("training.kubeflow.org/job-name") == name for p in pods)
    return bool(there < wanted)


def _waits_on_its_node(pod: Object) -> bool:
    """Whether a pod has a node, but no container has started or reports why not: a volume may be missing."""
    status = pod.get("status") or {}
    if status.get("phase") != "Pending" or not (pod.get("spec") or {}).get("nodeName"):
        return False
    states = [c.get("state") or {} for c in status.get("initContainerStatuses") or ()]
    states += [c.get("state") or {} for c in status.get("containerStatuses") or ()]
    return all((s.get("waiting") or {}).get("reason") in {"ContainerCreating", "PodInitializing"} for s in states)
