"""Sees every word that the operator says through the API: in each version of each DPOJob, and in events about them.

A word has the place that it was seen in: ``state Queued``, ``Progressing Starting`` (a condition and its reason),
``Progressing=True``, ``attempt NodeLost`` (why one ended), ``event Restarting``.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Self

import urllib3.exceptions

from dpo_api.status import STATES, ConditionType
from dpo_operator.reasons import Reason
from dpo_testing.kubeapi import DPOJOBS, EVENTS, Api, ApiError, Object, path_of


def words_of(job: Object) -> set[str]:
    """Return the words of one version of a DPOJob."""
    status = job.get("status") or {}
    words = {f"state {status['state']}"} if "state" in status else set()
    for condition in status.get("conditions") or ():
        words |= {f"{condition['type']} {condition['reason']}", f"{condition['type']}={condition['status']}"}
    return words | {f"attempt {a['reason']}" for a in status.get("attempts") or () if a.get("reason")}


class Witness:
    """A context manager that watches the DPOJobs of all namespaces, but those that are there before it."""

    def __init__(self, api: Api) -> None:
        """Prepare; entering it starts the watch."""
        self._api = api
        self._stop = threading.Event()
        self._seen: set[str] = set()
        self._former: set[str] = set()
        self._version = ""
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)

    def __enter__(self) -> Self:
        """Start watching."""
        self._former = {job["metadata"]["uid"] for job in self._api.list(DPOJOBS)}
        self._former |= {event["involvedObject"].get("uid", "") for event in self._api.list(EVENTS)}
        self._list()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join(10)

    def seen(self) -> set[str]:
        """Return every word that was seen until now."""
        events = self._api.list(EVENTS, fieldSelector="involvedObject.kind=DPOJob")
        ours = (event for event in events if event["involvedObject"]["uid"] not in self._former)
        return self._seen | {f"event {event['reason']}" for event in ours}

    def _list(self) -> None:
        listed = self._api.call("GET", path_of(DPOJOBS))
        self._version = listed["metadata"]["resourceVersion"]
        for job in listed["items"]:
            self._take(job)

    def _take(self, job: Object) -> None:
        if job["metadata"]["uid"] not in self._former:
            self._seen |= words_of(job)

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(ApiError, OSError, urllib3.exceptions.HTTPError):
                try:
                    self._watch()
                except ApiError:
                    self._list()

    def _watch(self) -> None:
        """Watch for a while, from where the last watch ended, so that no version is missed."""
        for news in self._api.watch(DPOJOBS, self._version):
            self._version = news["object"]["metadata"]["resourceVersion"]
            self._take(news["object"])


_ENDS_OF_JOBS = {"RestartsExhausted", "RestartsWithoutProgress", "DeadlineExceeded"}
_SUCCESSES = {"Succeeded", "StoppedEarly", "AlreadyComplete"}
_INVARIANTS = {
    "Scrape": "ProgressAvailable", "Policy": "ReferenceConsistent", "Loss": "Finite", "AboveChance": "Learning",
    "TooEarly": "Learning", "AtChance": "Learning", "MarginNegative": "Learning", "StepsAdvance": "TrainingStalled",
    "NoStep": "TrainingStalled", "Rank": "SlowRank", "Layout": "LayoutVerified",
}  # fmt: skip
"""The condition of each invariant's reason, by how it begins."""


def every_word() -> set[str]:
    """Return all words that the operator has, from its own tables."""
    of = {topic: {r.value for r in Reason if r.topic == topic} for topic in {r.topic for r in Reason}}
    conditions = {f"Accepted {word}" for word in of["acceptance"]}
    conditions |= {f"Progressing {word}" for word in of["progress"] - {"Resumed"}}
    conditions |= {f"Suspended {word}" for word in ("Suspended", "Checkpointing", "Resumed")}
    permanent = {r.value for r in Reason if r.topic == "cause" and r.retry == "permanent"}
    failed, done = permanent | _ENDS_OF_JOBS | {"Rejected", "ChildInvalid"}, _SUCCESSES
    conditions |= {f"{kind} {word}" for kind in ("Finished", "Succeeded", "Failed") for word in failed | done}
    conditions |= {f"Stalled {word}" for word in failed}
    for word in of["invariant"]:
        (kind,) = {kind for start, kind in _INVARIANTS.items() if word.startswith(start)}
        conditions.add(f"{kind} {word}")
    truths = {f"{kind.value}={truth}" for kind in ConditionType for truth in ("True", "False")}
    truths -= {"Finished=False", "Stalled=False", "NetworkRestricted=True"}
    attempts = {f"attempt {word}" for word in of["cause"] | {"DeadlineExceeded", "Suspended", "Succeeded"}}
    # An attempt that an operator finds ended when it finds the next one makes no event.
    events = {r.value for r in Reason if r.event is not None} - {"PodVanished"}
    return {f"state {s}" for s in STATES} | conditions | truths | attempts | {f"event {word}" for word in events}
