from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dpo_store import RetryPolicy, Store, open_store
from dpo_testing.faults import FaultProxy, Pauses, fault_proxy
from dpo_testing.s3server import S3Server, need, s3_server

SOON = RetryPolicy(attempts=4, read_timeout=60.0, connect_timeout=60.0, slow_window=60.0, slow_bytes=65536)
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    need("versitygw")
    with s3_server() as running:
        yield running


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    """One for each test: a request that an earlier test gave up may arrive late, and would be counted here."""
    with fault_proxy(server.endpoint) as running:
        yield running


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN", "DPO_PVC_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bucket(server: S3Server) -> str:
    """A new bucket for each test."""
    name = f"bucket-{next(_numbers)}"
    server.make_bucket(name)
    return name


@pytest.fixture(scope="session")
def primed(server: S3Server) -> Store:
    """A store that has made its client: that takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        store = open_store(server.options())
        store.exists("s3://no-such-bucket/x")
        return store


@pytest.fixture
def store(primed: Store, credentials: None) -> Store:
    """A store straight at the server."""
    return primed


@pytest.fixture
def flaky(server: S3Server, proxy: FaultProxy, credentials: None, pauses: Pauses) -> Store:
    """A store behind the fault proxy that gives up soon and makes no real pauses."""
    return open_store(server.options(endpoint=proxy.endpoint), retry=SOON, timing=pauses.timing())


@pytest.fixture
def hasty(server: S3Server, proxy: FaultProxy, credentials: None, pauses: Pauses) -> Store:
    """The same, but a second of silence is too much, and half a second of crawling: a busy machine has both."""
    policy = replace(SOON, read_timeout=1.0, slow_window=0.5)
    return open_store(server.options(endpoint=proxy.endpoint), retry=policy, timing=pauses.timing())
