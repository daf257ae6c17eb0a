"""Performs the actions of a pass in order and returns what the API server answered.

All actions are safe to repeat: names are deterministic, deletes carry a UID, and status writes a resourceVersion. So a
process that is killed between two actions only has to run the pass again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from typing import Any

from dpo_operator import size
from dpo_operator.runtime.cache import Cache, Key
from dpo_operator.runtime.client import ApiError, Client
from dpo_operator.runtime.resources import CHILDREN, CONFIG_MAPS, EVENTS, JOBS, NETWORK_POLICIES, Resource
from dpo_operator.types import (
    Action,
    CheckChild,
    ChildCheck,
    CreateChild,
    CreateConfigMap,
    CreateNetworkPolicy,
    DeleteChild,
    DeleteJob,
    EmitEvent,
    LookUpChild,
    LookUpConfigMap,
    Object,
    Observed,
    PatchStatus,
    Refusal,
)

_TOO_LARGE = ("request is too large", "send message larger than max")
"""etcd's words for an object that is too large. The API server answers them with 400 or 500."""

_CONSENT_SECONDS = 60.0
"""How long the API server's consent to a PyTorchJob counts for others whose pods are alike."""

_CONSENTS = 1000
"""How many kinds of pods are remembered."""

_INDEPENDENT = (CreateConfigMap, CreateNetworkPolicy, EmitEvent)
"""Actions that do not need each other."""

_REFUSALS = frozenset({400, 403, 404, 413, 422})

_log = logging.getLogger(__name__)


class Outdated(Exception):  # noqa: N818 - not an error: the job has changed
    """The DPOJob was changed or deleted; the decision is void."""


class Performer:
    """Sends requests to the API server, and adds their results to the cache before the watches deliver them."""

    def __init__(self, client: Client, cache: Cache, clock: Callable[[], float] = time.monotonic) -> None:
        """Act through ``client``."""
        self._client = client
        self._cache = cache
        self._clock = clock
        self._consents: OrderedDict[str, float] = OrderedDict()
        """By likeness of PyTorchJobs: until when none of them needs a dry run."""

    async def perform(self, key: Key, observed: Observed, actions: Iterable[Action]) -> Observed | None:
        """Perform actions in order. Return None when all are done, or what is observed now that one brought news.

        The ConfigMap and the NetworkPolicy are created at the same time, together with the events beside them: nothing
        needs an event.

        Raises ApiError and Unreachable for what may pass (429, 5xx, no answer), and Outdated.
        """
        for free, group in groupby(actions, lambda each: isinstance(each, _INDEPENDENT)):
            for together in [list(group)] if free else ([action] for action in group):
                news = await self._at_once(key[0], observed, together)
                if news is not None:
                    return news
        return None

    async def _at_once(self, namespace: str, observed: Observed, actions: Iterable[Action]) -> Observed | None:
        """Perform actions that do not need each other at the same time; one with news is enough for the next round."""
        answers = await asyncio.gather(
            *(self._one(namespace, observed, action) for action in actions), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return next((answer for answer in answers if isinstance(answer, Observed)), None)

    async def _one(self, namespace: str, observed: Observed, action: Action) -> Observed | None:  # noqa: C901, PLR0911 - one case for each action
        match action:
            case CreateConfigMap(body):
                return await self._create_once(CONFIG_MAPS, namespace, observed, body, "config_map")
            case CreateNetworkPolicy(body):
                return await self._create_once(NETWORK_POLICIES, namespace, observed, body, "network_policy")
            case CheckChild(body, generation, likeness):
                return await self._check(namespace, observed, body, generation, likeness)
            case CreateChild(body):
                return await self._create_child(namespace, observed, body)
            case LookUpChild(name):
                found = await self._client.find(CHILDREN, namespace, name)
                return _with_child(observed, found) if found else _without_child(observed, name)
            case LookUpConfigMap(name):
                found = await self._client.find(CONFIG_MAPS, namespace, name)
                return replace(observed, config_map=found) if found else _absent(observed, name)
            case DeleteChild(name, uid):
                return await self._delete_child(namespace, observed, name, uid)
            case DeleteJob(name, uid):
                await self._delete_job(namespace, name, uid)
                return None
            case EmitEvent(body):
                await self._emit(namespace, body)
                return None
            case PatchStatus(body):
                return await self._patch_status(namespace, observed, body)

    async def _create_once(
        self, resource: Resource, namespace: str, observed: Observed, body: Object, field: str
    ) -> Observed | None:
        """Create an object of which a job has one; one that exists already goes into ``field`` of what is observed."""
        name = body["metadata"]["name"]
        try:
            await self._client.create(resource, namespace, body)
        except ApiError as error:
            if error.status != 409:
                return _refused(observed, name, error)
            # If it was deleted since, the next pass creates it.
            found: dict[str, Any] = {field: await self._client.get(resource, namespace, name)}
            return replace(observed, **found)
        return None

    async def _check(
        self, namespace: str, observed: Observed, body: Object, generation: int, likeness: str
    ) -> Observed:
        refusal = None
        if self._consents.get(likeness, float("-inf")) < self._clock():
            try:
                await self._client.create(CHILDREN, namespace, body, dry_run=True)
            except ApiError as error:
                if error.status != 409:  # the name is taken, so the object passed admission
                    refusal = _refusal(error)
            self._note(likeness, consent=refusal is None)
        return replace(observed, check=ChildCheck(generation, refusal))

    def _note(self, likeness: str, *, consent: bool) -> None:
        """Remember the answer to a dry run; a refusal counts for its own job alone."""
        self._consents.pop(likeness, None)
        if consent:
            self._consents[likeness] = self._clock() + _CONSENT_SECONDS
        while len(self._consents) > _CONSENTS:
            self._consents.popitem(last=False)

    async def _create_child(self, namespace: str, observed: Observed, body: Object) -> Observed | None:
        name = body["metadata"]["name"]
        try:
            made = await self._client.create(CHILDREN, namespace, body)
        except ApiError as error:
            if error.status != 409:
                return _refused(observed, name, error)
            return _with_child(observed, await self._client.get(CHILDREN, namespace, name))
        self._cache.put(CHILDREN, made, watched=False)
        return None

    async def _delete_child(self, namespace: str, observed: Observed, name: str, uid: str) -> Observed | None:
        try:
            await self._client.delete(CHILDREN, namespace, name, uid)
        except ApiError as error:
            if error.status in {404, 409}:  # deleted, or another object of the same name
                self._cache.remove(CHILDREN, namespace, name, uid)
                return None
            return _refused(observed, name, error)
        return None

    async def _delete_job(self, namespace: str, name: str, uid: str) -> None:
        try:
            await self._client.delete(JOBS, namespace, name, uid)
        except ApiError as error:
            if error.status not in {404, 409}:
                raise

    async def _emit(self, namespace: str, body: Object) -> None:
        try:
            await self._client.create(EVENTS, namespace, body)
        except ApiError as error:
            if error.status not in _REFUSALS | {409}:
                raise
            if error.status != 409:
                # A namespace that is being deleted accepts no events. No job waits for one.
                _log.info("an event could not be created: %s", error)

    async def _patch_status(self, namespace: str, observed: Observed, body: Object) -> Observed | None:
        name = observed.job["metadata"]["name"]
        try:
            done = await self._client.patch_status(JOBS, namespace, name, body)
        except ApiError as error:
            limit = size.smaller(observed.status_limit)
            if is_too_large(error) and limit is not None:
                _log.warning("the status of %s/%s is too large: %s", namespace, name, error)
                return replace(observed, status_limit=limit)
            if error.status not in {404, 409}:
                raise
            # The watch may deliver it late; without it the next pass would repeat this one.
            newer = await self._client.find(JOBS, namespace, name)
            uid = observed.job["metadata"]["uid"]
            if newer is None or newer["metadata"]["uid"] != uid:
                self._cache.remove(JOBS, namespace, name, uid)
            if newer is not None:
                self._cache.put(JOBS, newer, watched=False)
            raise Outdated from error
        self._cache.put(JOBS, done, watched=False)
        return None


def is_too_large(error: ApiError) -> bool:
    """Whether an object is refused for its size: by the API server (413), by etcd, or by the connection to it."""
    return error.status == 413 or any(words in error.message for words in _TOO_LARGE)


def _refusal(error: ApiError) -> Refusal:
    if error.status not in _REFUSALS:
        raise error
    return Refusal(error.status, error.message)


def _refused(observed: Observed, name: str, error: ApiError) -> Observed:
    return replace(observed, refusals={**observed.refusals, name: _refusal(error)})


def _with_child(observed: Observed, child: Object) -> Observed:
    name = child["metadata"]["name"]
    others = [c for c in observed.children if c["metadata"]["name"] != name]
    return replace(observed, children=(*others, child), absent=observed.absent - {name})


def _without_child(observed: Observed, name: str) -> Observed:
    others = tuple(c for c in observed.children if c["metadata"]["name"] != name)
    return _absent(replace(observed, children=others), name)


def _absent(observed: Observed, name: str) -> Observed:
    return replace(observed, absent=observed.absent | {name})
