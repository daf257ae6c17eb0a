"""Runs one DPOJob until it finishes. The test passes only if the job succeeds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from dpo_operator.runtime.client import ApiError, Client, Unreachable
from dpo_operator.runtime.resources import JOBS, Resource

CLAIMS = Resource("", "v1", "persistentvolumeclaims")
LOOK_SECONDS = 1.0


class HelmTestError(Exception):
    """The job did not succeed; the text says why."""


async def run(
    client: Client,
    namespace: str,
    manifest: Mapping[str, Any],
    *,
    seconds: float,
    tell: Callable[[str], None],
    claim: str = "",
) -> dict[str, Any]:
    """Create a new DPOJob, wait until it finishes, delete it and ``claim``, and return its last status.

    A job that does not succeed is kept for inspection and raises HelmTestError; the next test deletes it.
    """
    name = str(manifest["metadata"]["name"])
    deadline = time.monotonic() + seconds
    await clear(client, namespace, name, seconds=seconds)
    created = await _ask(client.create(JOBS, namespace, dict(manifest)), f"DPOJob {namespace}/{name} cannot be created")
    uid = str(created["metadata"]["uid"])
    tell(f"DPOJob {namespace}/{name} is created")
    status = await _follow(client, namespace, name, uid, deadline, tell)
    await _ask(client.delete(JOBS, namespace, name, uid), f"DPOJob {namespace}/{name} cannot be deleted")
    if claim:
        path = CLAIMS.path(namespace, claim)
        await _ask(client.request("DELETE", path), f"PersistentVolumeClaim {namespace}/{claim} cannot be deleted")
    return status


async def _follow(
    client: Client, namespace: str, name: str, uid: str, deadline: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    reported = ""
    while True:
        status: dict[str, Any] = {}
        try:
            job = await client.find(JOBS, namespace, name)
        except Unreachable as error:
            tell(f"the API server does not answer: {error}")
        else:
            if job is None or job["metadata"]["uid"] != uid:
                raise HelmTestError(f"DPOJob {namespace}/{name} was deleted by somebody else")
            status = job.get("status") or {}
            said = f"{status.get('state', 'not seen by an operator yet')}: {status.get('message', '')}".rstrip(": ")
            if said != reported:
                reported = said
                tell(said)
            if status.get("state") == "Succeeded":
                return status
            if status.get("state") in {"Failed", "Rejected"}:
                raise HelmTestError(f"DPOJob {namespace}/{name} ended as {reported}")
        if time.monotonic() > deadline:
            raise HelmTestError(
                f"DPOJob {namespace}/{name} has not ended in time; last seen: {reported or 'nothing'}."
                f" `kubectl describe dpo {name} -n {namespace}` says more"
            )
        await asyncio.sleep(LOOK_SECONDS)


async def clear(client: Client, namespace: str, name: str, *, seconds: float) -> None:
    """Delete an earlier test's job and wait until it is gone."""
    deadline = time.monotonic() + seconds
    refused = f"DPOJobs of {namespace} cannot be read"
    while (job := await _ask(client.find(JOBS, namespace, name), refused)) is not None:
        if not job["metadata"].get("deletionTimestamp"):
            await _ask(client.delete(JOBS, namespace, name, str(job["metadata"]["uid"])), f"{name} cannot be deleted")
        if time.monotonic() > deadline:
            raise HelmTestError(f"DPOJob {namespace}/{name} of an earlier test could not be deleted in time")
        await asyncio.sleep(LOOK_SECONDS)


async def _ask(request: Any, refused: str) -> Any:
    try:
        return await request
    except (ApiError, Unreachable) as error:
        raise HelmTestError(f"{refused}: {error}") from error
