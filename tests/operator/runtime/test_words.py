"""What a pass does when the events of its pods can't be read: it uses those that it knew, and asks again later."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import kopf
import pytest

from dpo_operator.runtime import words
from dpo_operator.runtime.client import Client
from dpo_operator.runtime.words import Words
from dpo_operator.types import Observed
from dpo_testing.faketrainer import FakeTrainer
from dpo_testing.s3server import free_port

KEY = ("team", "job")
EVENT = {"metadata": {"name": "e"}, "reason": "FailedMount", "message": "no such claim"}
WAITING: dict[str, Any] = {
    "metadata": {"name": "job-1-master-0", "uid": "u"},
    "spec": {"nodeName": "n"},
    "status": {
        "phase": "Pending",
        "containerStatuses": [{"name": "pytorch", "state": {"waiting": {"reason": "ContainerCreating"}}}],
    },
}


class Asker:
    """One job whose pod waits on its node, an API server with a given answer, and a clock."""

    def __init__(self, server: FakeTrainer, port: int) -> None:
        self.server = server
        self._port = port

    def run(self, *moments: float, statuses: Mapping[float, int] | None = None) -> list[tuple[int, int]]:
        """Ask at each moment; return the number of requests so far and of events known.

        ``statuses``: with what the server answers from a moment on.
        """
        now = [0.0]

        async def ask() -> list[tuple[int, int]]:
            client = Client(lambda: kopf.ConnectionInfo(server=f"http://127.0.0.1:{self._port}"), user_agent="test")
            known = Words(client, clock=lambda: now[0])
            seen = []
            for moment in moments:
                now[0] = moment
                self.server.status = (statuses or {}).get(moment, self.server.status)
                events = await known.about(KEY, Observed(job={}, pods=[WAITING]))
                seen.append((self.server.asked, len(events)))
            await client.close()
            return seen

        return asyncio.run(ask())


@pytest.fixture
def asker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asker]:
    monkeypatch.setattr(words, "WAIT_SECONDS", 30.0)  # a busy machine is not a slow API server
    port = free_port()
    with FakeTrainer("127.0.0.1", port) as server:
        server.body = json.dumps({"items": [EVENT]}).encode()
        yield Asker(server, port)


def test_events_are_read_now_and_then(asker: Asker) -> None:
    assert asker.run(0, 2, 3, 4, 17, 18) == [(0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_refused_list_is_not_repeated_at_once(asker: Asker, status: int) -> None:
    asker.server.status = status
    moments = (0, 3, 32, 33, 92, 93, 212, 213)
    assert [asked for asked, _ in asker.run(*moments)] == [0, 1, 1, 2, 2, 3, 3, 4], "pauses of 30, 60 and 120 s"


def test_the_server_may_ask_for_a_longer_pause(asker: Asker) -> None:
    asker.server.status, asker.server.headers = 429, {"Retry-After": "100"}
    assert [asked for asked, _ in asker.run(0, 3, 102, 103)] == [0, 1, 1, 2]


def test_a_slow_list_is_given_up(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "WAIT_SECONDS", 1.0)
    asker.server.delay = 60.0
    seen = asker.run(0, 3, 32)
    assert [known for _, known in seen] == [0, 0, 0]
    assert seen[1] == seen[2], "it is not asked again before the pause is over"


def test_what_is_known_is_kept_and_a_success_ends_the_pauses(asker: Asker) -> None:
    seen = asker.run(0, 3, 18, 48, 63, 92, 93, statuses={18: 403, 48: 200, 63: 403, 92: 200})
    assert seen == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1), (4, 1), (5, 1)]
