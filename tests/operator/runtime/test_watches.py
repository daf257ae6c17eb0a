"""How lists reach the cache: page by page, beside kopf, which keeps nothing of them."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from dpo_operator.runtime.resources import JOBS, PODS, Resource
from dpo_operator.runtime.watches import _NoMemories, _pages


def test_the_objects_of_a_list_are_taken_and_kopf_sees_an_empty_page() -> None:
    """It comes when its objects are taken: otherwise all pages of a large list would wait in memory."""
    taken: list[tuple[Resource, list[dict[str, Any]]]] = []
    answers = {
        PODS.path(): {"metadata": {"continue": "more"}, "items": [{"metadata": {"name": "p"}}]},
        JOBS.path("ns"): {"metadata": {"continue": ""}, "items": [{"metadata": {"name": "j"}}]},
        f"/clusters/c{PODS.path('ns')}": {"metadata": {}, "items": [{"metadata": {"name": "behind a proxy"}}]},
        PODS.api: {"resources": [{"name": "pods"}]},
        "/api/v1/nodes": {"items": [{"metadata": {"name": "n"}}]},
        f"{PODS.path('ns')}/p": {"kind": "Status", "items": None},
    }

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(answers[request.path])

    async def ask() -> dict[str, Any]:
        gate = asyncio.Event()

        async def take(resource: Resource, items: list[dict[str, Any]]) -> None:
            await gate.wait()
            taken.append((resource, items))

        server = web.Application()
        server.router.add_get("/{path:.*}", answer)
        async with (
            TestServer(server) as served,
            aiohttp.ClientSession(response_class=_pages((JOBS, PODS), take)) as session,
        ):

            async def get(path: str) -> Any:
                async with session.get(served.make_url(path)) as found:
                    return await found.json()

            first = asyncio.create_task(get(PODS.path()))
            nodes = await get("/api/v1/nodes")
            assert nodes == answers["/api/v1/nodes"]
            assert not first.done()
            gate.set()
            return {PODS.path(): await first} | {path: await get(path) for path in answers if path != PODS.path()}

    seen = asyncio.run(ask())
    assert seen[PODS.path()] == {"metadata": {"continue": "more"}, "items": []}
    assert seen[JOBS.path("ns")]["items"] == []
    assert seen[PODS.api] == answers[PODS.api]
    assert [(resource, items[0]["metadata"]["name"]) for resource, items in taken] == [
        (PODS, "p"),
        (JOBS, "j"),
        (PODS, "behind a proxy"),
    ]


def test_kopf_remembers_no_object() -> None:
    """It has 2 KiB for each object that has ever changed, and never asks for them here."""
    memories = _NoMemories()
    asyncio.run(memories.recall({"metadata": {"uid": "u"}}, noticed_by_listing=False))  # type: ignore[arg-type]
    assert list(memories.iter_all_memories()) == []
