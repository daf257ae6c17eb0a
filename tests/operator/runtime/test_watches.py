"""How objects reach the cache: page by page and event by event, beside kopf, which sees none of them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from dpo_operator.runtime.resources import JOBS, PODS, Resource
from dpo_operator.runtime.watches import _responses


def test_the_objects_of_a_list_are_taken_and_kopf_sees_an_empty_page() -> None:
    """It comes when its objects are taken: otherwise all pages of a large list would wait in memory."""
    taken: list[tuple[Resource, list[tuple[str | None, dict[str, Any]]]]] = []
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

        async def take(resource: Resource, events: list[tuple[str | None, dict[str, Any]]]) -> None:
            await gate.wait()
            taken.append((resource, events))

        server = web.Application()
        server.router.add_get("/{path:.*}", answer)
        async with (
            TestServer(server) as served,
            aiohttp.ClientSession(response_class=_responses((JOBS, PODS), take)) as session,
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
    assert [(resource, *events[0][:1], events[0][1]["metadata"]["name"]) for resource, events in taken] == [
        (PODS, None, "p"),
        (JOBS, None, "j"),
        (PODS, None, "behind a proxy"),
    ]


def event(kind: str, name: str, version: int) -> bytes:
    return json.dumps({"type": kind, "object": {"metadata": {"name": name, "resourceVersion": str(version)}}}).encode()


def test_the_events_of_a_watch_are_taken_and_kopf_sees_their_version() -> None:
    """It sees it when they are taken: a watch that breaks then goes on behind what the cache has."""
    taken: list[tuple[Resource, str | None, str]] = []
    expired = json.dumps({"type": "ERROR", "object": {"kind": "Status", "code": 410}}).encode()
    bookmark = json.dumps({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "40"}}}).encode()
    lines = [event("ADDED", "a", 7), event("DELETED", "b", 9), bookmark, event("MODIFIED", "c", 50), expired]
    text = b"\n".join((*lines, b'{"type": "ADD'))  # the last line is cut off: the connection broke

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=403 if request.query.get("no") else 200)
        await response.prepare(request)
        for part in (text[:30], text[30:31], text[31:]):
            await response.write(part)
            await asyncio.sleep(0.01)
        return response

    async def read() -> tuple[list[bytes], bytes, bytes]:
        gate = asyncio.Event()

        async def take(resource: Resource, events: list[tuple[str | None, dict[str, Any]]]) -> None:
            await gate.wait()
            taken.extend((resource, kind, item["metadata"]["name"]) for kind, item in events)

        server = web.Application()
        server.router.add_get("/{path:.*}", answer)
        async with (
            TestServer(server) as served,
            aiohttp.ClientSession(response_class=_responses((JOBS, PODS), take)) as session,
        ):

            async def get(path: str, **query: str) -> bytes:
                async with session.get(served.make_url(path).with_query(query)) as found:
                    return b"".join([part async for part in found.content.iter_chunked(1 << 20)])

            watching = asyncio.create_task(get(PODS.path("ns"), watch="true"))
            other = await get("/api/v1/nodes", watch="true")
            refused = await get(PODS.path("ns"), watch="true", no="1")
            assert not watching.done()
            gate.set()
            return (await watching).split(b"\n"), other, refused

    seen, other, refused = asyncio.run(read())
    assert other == refused == text
    assert taken == [(PODS, "ADDED", "a"), (PODS, "DELETED", "b"), (PODS, "MODIFIED", "c")]
    mark = '{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "%s"}}}'
    assert seen == [(mark % 9).encode(), bookmark, (mark % 50).encode(), expired, b'{"type": "ADD']
