"""What is asked of the API server, and what is known without asking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kopf
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dpo_operator.config import Settings
from dpo_operator.reconcile import reconcile
from dpo_operator.runtime.cache import Cache
from dpo_operator.runtime.client import Client
from dpo_operator.runtime.performer import Performer
from dpo_operator.types import CheckChild, CreateChild, CreateConfigMap, CreateNetworkPolicy, EmitEvent, Observed
from dpo_testing.jobs import manifest

MINUTE = 60.0


def new_job(name: str, namespace: str = "team", **spec: Any) -> Observed:
    job = manifest(name, **spec)
    job["metadata"] |= {
        "namespace": namespace, "uid": f"uid of {name}", "generation": 1, "resourceVersion": "5",
        "creationTimestamp": f"2026-01-01T00:00:{len(name):02}Z",
    }  # fmt: skip
    return Observed(job=job)


class Asked:
    """An API server that judges dry runs, and a performer with a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.status = 201
        self.dry_runs: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        assert request.query["dryRun"] == "All"
        assert request.query["fieldValidation"] == "Strict"
        body = await request.json()
        self.dry_runs.append(body["metadata"]["name"])
        return web.json_response(body if self.status == 201 else {"message": "no"}, status=self.status)

    def run(self, story: Callable[[Callable[..., Any]], Any]) -> None:
        """Play a story, which checks new jobs through its argument."""

        async def play() -> None:
            server = web.Application()
            server.router.add_post("/{path:.*}", self.answer)
            async with TestServer(server) as served:
                client = Client(lambda: kopf.ConnectionInfo(server=str(served.make_url("/"))), user_agent="test")
                performer = Performer(client, Cache(), clock=lambda: self.now)

                async def check(observed: Observed) -> int | None:
                    """Return the code of the refusal, None for a consent."""
                    (action,) = reconcile(observed, 1_800_000_000.0, Settings()).actions
                    assert isinstance(action, CheckChild)
                    namespace = observed.job["metadata"]["namespace"]
                    found = await performer.perform((namespace, "any"), observed, [action])
                    assert found is not None
                    assert found.check is not None
                    assert found.check.generation == 1
                    return found.check.refusal.code if found.check.refusal is not None else None

                await story(check)
                await client.close()

        asyncio.run(play())


@pytest.mark.parametrize("status", [201, 409], ids=["accepted", "its name is taken"])
def test_jobs_whose_pods_are_alike_need_one_dry_run_a_minute(status: int) -> None:
    asked = Asked()
    asked.status = status

    async def story(check: Callable[[Observed], Any]) -> None:
        first = new_job("first")
        for observed in (first, new_job("second", dpo={"beta": 0.3}, training={"seed": 2}), first):
            assert await check(observed) is None
        assert asked.dry_runs == ["first-1"]
        asked.now += MINUTE + 1
        assert await check(new_job("third")) is None
        assert asked.dry_runs == ["first-1", "third-1"]

    asked.run(story)


def test_a_refusal_counts_for_its_own_job_alone() -> None:
    asked = Asked()

    async def story(check: Callable[[Observed], Any]) -> None:
        assert await check(new_job("a")) is None
        asked.now += MINUTE + 1
        asked.status = 403
        assert [await check(new_job(name)) for name in "bc"] == [403, 403]
        asked.status = 201
        assert [await check(new_job(name)) for name in "de"] == [None, None]
        assert asked.dry_runs == ["a-1", "b-1", "c-1", "d-1"]

    asked.run(story)


@pytest.mark.parametrize(
    "change",
    [
        {"image": "localhost/trainer:2"},
        {"resources": {"nodes": 2, "gpusPerNode": 0}},
        {"resources": {"nodes": 1, "gpusPerNode": 1}},
        {"podTemplate": {"topologySpreadConstraints": [{"maxSkew": 1}]}},
        {"podTemplate": {"labels": {"team": "a"}}},
        {"serviceAccountName": "trainer"},
        {"checkpoint": {"uri": "s3://runs/a/", "gracePeriodSeconds": 40}},
        {"checkpoint": {"uri": "pvc://claim/a/", "gracePeriodSeconds": 30}},
        {"runPolicy": {"queueName": "queue"}},
    ],
    ids=str,
)
def test_other_pods_have_a_dry_run_of_their_own(change: dict[str, Any]) -> None:
    asked = Asked()

    async def story(check: Callable[[Observed], Any]) -> None:
        assert await check(new_job("a")) is None
        asked.status = 422
        assert await check(new_job("b", **change)) == 422
        assert asked.dry_runs == ["a-1", "b-1"]

    asked.run(story)


def test_another_namespace_and_other_annotations_have_a_dry_run_of_their_own() -> None:
    asked = Asked()

    async def story(check: Callable[[Observed], Any]) -> None:
        await check(new_job("a"))
        await check(new_job("b", "other"))
        annotated = new_job("c")
        annotations = {"provreq.kueue.x-k8s.io/maxRunDurationSeconds": "60"}
        metadata = {**annotated.job["metadata"], "annotations": annotations}
        await check(replace(annotated, job={**annotated.job, "metadata": metadata}))
        assert asked.dry_runs == ["a-1", "b-1", "c-1"]

    asked.run(story)


@pytest.mark.parametrize("refused", [False, True], ids=["all are created", "one is refused"])
def test_what_a_pytorchjob_needs_is_created_at_once_and_before_it(refused: bool) -> None:
    """The server answers the first three requests only when all of them have arrived."""
    asked: list[str] = []
    together = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path.rpartition("/")[2])
        if len(asked) == 3:
            together.set()
        await asyncio.wait_for(together.wait(), 10)
        denied = refused and request.path.endswith("configmaps")
        return web.json_response({"message": "no"} if denied else await request.json(), status=403 if denied else 201)

    def named(name: str) -> dict[str, Any]:
        return {"metadata": {"name": name, "namespace": "team", "uid": "u", "resourceVersion": "1"}}

    actions = [
        EmitEvent(named("accepted")), CreateConfigMap(named("spec")), CreateNetworkPolicy(named("wall")),
        CreateChild(named("job-1")),
    ]  # fmt: skip

    async def play() -> Observed | None:
        server = web.Application()
        server.router.add_post("/{path:.*}", answer)
        async with TestServer(server) as served:
            client = Client(lambda: kopf.ConnectionInfo(server=str(served.make_url("/"))), user_agent="test")
            news = await Performer(client, Cache()).perform(("team", "job"), new_job("job"), actions)
            await client.close()
        return news

    news = asyncio.run(play())
    assert sorted(asked[:3]) == ["configmaps", "events", "networkpolicies"]
    if refused:
        assert news is not None
        assert news.refusals["spec"].code == 403
    assert asked[3:] == ([] if refused else ["pytorchjobs"])
