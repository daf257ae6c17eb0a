"""The store behind a proxy that fails on order: nothing lost, nothing twice, and an end to patience."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import AccessDeniedError, DPOError, StorageUnavailableError
from dpo_store import ObjectChangedError, RetryPolicy, Store, Timing, open_store
from dpo_store.lines import lines
from dpo_store.multipart import PART
from dpo_testing.faults import FaultProxy, Kind, Pauses
from dpo_testing.s3server import S3Server

KINDS: tuple[Kind, ...] = ("status", "reset", "short", "stall", "drip")
CHUNK = 1 << 20
DATA = random.Random(5).randbytes(5 * CHUNK + 12345)


@pytest.fixture
def uri(store: Store, bucket: str) -> str:
    store.write(f"s3://{bucket}/data", DATA)
    return f"s3://{bucket}/data"


@pytest.mark.parametrize("ahead", [pytest.param(0, marks=pytest.mark.nightly), 2 * CHUNK])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("status", {"code": 503, "reason": "SlowDown"}),
        ("status", {"code": 500, "reason": "InternalError"}),
        ("status", {"code": 502, "reason": "SomethingNew"}),
        ("status", {"code": 429, "reason": "TooManyRequests"}),
        ("reset", {"after": 0}),
        ("reset", {"after": 300_001}),
        ("short", {"after": 0}),
        ("short", {"after": 1}),
        ("stall", {"after": 262_144, "seconds": 60}),
        ("drip", {"after": 70_000, "seconds": 0.02}),
    ],
)
def test_nothing_is_lost_or_comes_twice(
    flaky: Store, hasty: Store, proxy: FaultProxy, pauses: Pauses, uri: str, kind: Any, settings: dict[str, Any],
    ahead: int,
) -> None:  # fmt: skip
    known_by_time = kind in {"stall", "drip"}
    used = hasty if known_by_time else flaky
    info = used.stat(uri)
    proxy.add(kind, times=3, **settings)
    pauses.taken.clear()
    blocks = list(used.stream(info, ahead))
    assert b"".join(blocks) == DATA
    assert all(len(block) <= CHUNK for block in blocks)
    # One request, and one more for each failure: what came before it was kept.
    failures = len(pauses.taken)
    assert proxy.count("GET") == 1 + failures
    assert failures >= 3 if known_by_time else failures == 3


def test_a_range_resumes_at_the_byte_it_reached(flaky: Store, proxy: FaultProxy, uri: str) -> None:
    last = len(DATA) - 1
    proxy.add("short", after=400_000)
    proxy.add("short", after=last - 400_000)  # all but the last byte
    assert b"".join(flaky.stream(uri, ahead=0)) == DATA
    assert [seen.range for seen in proxy.seen if seen.method == "GET"] == [
        f"bytes=0-{last}",
        f"bytes=400000-{last}",
        f"bytes={last}-{last}",
    ]


@pytest.mark.parametrize("seed", range(2))
def test_every_line_once_on_a_bad_day(
    server: S3Server, store: Store, proxy: FaultProxy, bucket: str, pauses: Pauses, seed: int
) -> None:
    policy = RetryPolicy(attempts=20, read_timeout=0.2, slow_window=0.1, slow_bytes=1024)
    flaky = open_store(server.options(endpoint=proxy.endpoint), retry=policy, timing=pauses.timing())
    rng = random.Random(seed)
    wanted = [f'{{"id": {n}, "text": "{rng.randbytes(rng.randrange(400)).hex()}"}}'.encode() for n in range(50_000)]
    text = b"\n".join(wanted) + b"\n"
    store.write(f"s3://{bucket}/t.jsonl", text)
    for _ in range(40):
        kind: Kind = rng.choice(KINDS)
        proxy.add(kind, after=rng.randrange(CHUNK), seconds=0.01 if kind == "drip" else 1)
    found = hashlib.sha256()
    number = 0
    for number, line in lines(flaky.stream(f"s3://{bucket}/t.jsonl", ahead=CHUNK), "t.jsonl"):
        assert line == wanted[number - 1]
        found.update(line + b"\n")
    assert number == len(wanted)
    assert found.digest() == hashlib.sha256(text).digest()
    assert sum(seen.fault is not None for seen in proxy.seen) > 10


def test_patience_ends_and_its_pauses_grow_with_jitter(
    flaky: Store, proxy: FaultProxy, uri: str, pauses: Pauses
) -> None:
    proxy.add("status", times=99)
    with pytest.raises(StorageUnavailableError, match=r"data: the storage is overloaded.*gave up after 4 tries"):
        list(flaky.stream(flaky.stat(uri), ahead=0))
    assert proxy.count("GET") == 4
    # base * 2**n, here 0.5 s; the injected random is 0.5.
    assert pauses.taken == [0.5, 1.0, 2.0]


def test_a_server_that_only_ever_drips_is_given_up(hasty: Store, proxy: FaultProxy, uri: str) -> None:
    info = hasty.stat(uri)
    proxy.add("drip", times=99, seconds=0.05)
    with pytest.raises(StorageUnavailableError, match=r"sent \d+ bytes in \d+ s \(gave up after 4 tries\)"):
        list(hasty.stream(info, ahead=0))


@pytest.mark.parametrize("kind", ["short", "reset"])
def test_a_server_that_sends_nothing_is_given_up(flaky: Store, proxy: FaultProxy, uri: str, kind: Kind) -> None:
    info = flaky.stat(uri)
    proxy.add(kind, times=9)
    with pytest.raises(StorageUnavailableError, match=r"gave up after 4 tries"):
        list(flaky.stream(info, ahead=0))
    assert proxy.count("GET") == 4


def test_progress_renews_patience(flaky: Store, proxy: FaultProxy, uri: str) -> None:
    # 20 cuts, each after 100 kB: far more failures than the four tries of one standstill.
    proxy.add("short", times=20, after=100_000)
    assert b"".join(flaky.stream(uri, ahead=0)) == DATA
    assert proxy.count("GET") == 21


def test_permanent_errors_are_not_tried_again(flaky: Store, proxy: FaultProxy, uri: str, pauses: Pauses) -> None:
    proxy.add("status", times=9, code=403, reason="AccessDenied")
    with pytest.raises(AccessDeniedError, match="access denied"):
        list(flaky.stream(flaky.stat(uri), ahead=0))
    assert proxy.count("GET") == 1
    assert pauses.taken == []


def test_a_head_without_a_body_is_asked_again_for_its_reason(flaky: Store, proxy: FaultProxy, uri: str) -> None:
    for code in (400, 403):
        proxy.add("status", method="HEAD", code=code, times=2)  # boto3 itself asks for the bucket's region after a 400
        proxy.add("status", method="GET", code=code, reason="ExpiredToken")
        with pytest.raises(AccessDeniedError, match="the credentials have expired"):
            flaky.stat(uri)
        proxy.clear()
    proxy.add("status", method="HEAD", code=403)
    assert flaky.stat(uri).size == len(DATA)


@pytest.mark.parametrize("new", [DATA[::-1], DATA[:-1], DATA + b"x"], ids=["rewritten", "shorter", "longer"])
def test_a_change_under_way_is_found(store: Store, flaky: Store, proxy: FaultProxy, uri: str, new: bytes) -> None:
    proxy.add("short", after=CHUNK)
    proxy.add("delay", action=lambda: store.write(uri, new))
    with pytest.raises(ObjectChangedError, match="changed"):
        list(flaky.stream(uri, ahead=CHUNK))


def test_a_range_of_a_described_object_is_one_request(store: Store, flaky: Store, proxy: FaultProxy, uri: str) -> None:
    info = flaky.stat(uri)
    proxy.clear()
    assert flaky.read(info, 5, 100) == DATA[5:105]
    assert [(seen.method, seen.range) for seen in proxy.seen] == [("GET", "bytes=5-104")]
    store.write(uri, DATA[::-1])
    with pytest.raises(ObjectChangedError):
        flaky.read(info, 5, 100)


def test_a_server_that_ignores_if_match_is_found_out(flaky: Store, proxy: FaultProxy, uri: str) -> None:
    proxy.add("short", after=CHUNK)
    proxy.add("etag")
    with pytest.raises(ObjectChangedError, match="its ETag is another"):
        list(flaky.stream(uri, ahead=CHUNK))


def test_a_server_without_ranges_is_refused_but_for_whole_objects(flaky: Store, proxy: FaultProxy, uri: str) -> None:
    proxy.add("no_range", times=99)
    assert b"".join(flaky.stream(uri)) == DATA
    with pytest.raises(StorageUnavailableError, match="does not answer range requests"):
        list(flaky.stream(uri, start=1))


def test_writes_and_listings_try_again_too(flaky: Store, proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    for method in ("PUT", "GET", "HEAD", "DELETE", "POST"):
        proxy.add("status", method=method, times=2)
    (tmp_path / "big").write_bytes(DATA * 4)  # more than one part
    flaky.write(f"s3://{bucket}/small", b"x")
    flaky.upload(tmp_path / "big", f"s3://{bucket}/big")
    assert [info.size for info in flaky.expand(f"s3://{bucket}/")] == [4 * len(DATA), 1]
    flaky.download(f"s3://{bucket}/big", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == DATA * 4
    flaky.delete(f"s3://{bucket}/small")
    assert not flaky.exists(f"s3://{bucket}/small")
    assert not any(fault.times for fault in proxy.faults)


def test_an_upload_whose_last_answer_is_lost_is_complete(
    flaky: Store, proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "big").write_bytes(DATA * 4)
    proxy.add("status", method="POST", path="uploadId=", code=500, reason="InternalError", lost=True)
    flaky.upload(tmp_path / "big", f"s3://{bucket}/big")
    assert flaky.read(f"s3://{bucket}/big") == DATA * 4
    assert proxy.count("POST", "uploadId=") == 2


def test_a_failed_upload_leaves_nothing(
    server: S3Server, flaky: Store, proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "big").write_bytes(bytes(2 * PART))
    proxy.add("status", method="PUT", path="partNumber=2", times=99)
    with pytest.raises(StorageUnavailableError):
        flaky.upload(tmp_path / "big", f"s3://{bucket}/big")
    assert not flaky.exists(f"s3://{bucket}/big")
    assert "Uploads" not in server.client().list_multipart_uploads(Bucket=bucket)


def test_a_failed_download_leaves_nothing(flaky: Store, proxy: FaultProxy, uri: str, tmp_path: Path) -> None:
    (tmp_path / "down").write_bytes(b"old")
    proxy.add("reset", times=99, after=1000)
    with pytest.raises(StorageUnavailableError):
        flaky.download(uri, tmp_path / "down")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("ahead", [0, CHUNK])
def test_a_reader_that_leaves_closes_the_connection(
    server: S3Server, store: Store, proxy: FaultProxy, bucket: str, flaky: Store, ahead: int
) -> None:
    size = 64 * CHUNK  # more than the buffers of all sockets on the way
    with (server.folder / bucket / "large").open("wb") as file:
        file.truncate(size)
    blocks = flaky.stream(f"s3://{bucket}/large", ahead)
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    _wait(lambda: not any(t.name.startswith("dpo-store") for t in threading.enumerate()))
    _wait(lambda: proxy.ended == 1)
    assert proxy.count("GET") == 1
    assert proxy.sent < size


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "an abandoned stream is still running"
        time.sleep(0.01)


def test_a_caller_that_leaves_during_a_pause_ends_the_tries(
    server: S3Server, proxy: FaultProxy, uri: str, credentials: None
) -> None:
    pausing, left = threading.Event(), threading.Event()

    def pause(seconds: float) -> None:
        pausing.set()
        left.wait(10)

    store = open_store(server.options(endpoint=proxy.endpoint), timing=Timing(sleep=pause))
    proxy.add("short", after=CHUNK)
    proxy.add("short", times=99)
    blocks = store.stream(uri, ahead=2 * CHUNK)  # more than comes before the pause, else the thread may wait for room
    next(blocks)
    assert pausing.wait(10)
    seen = proxy.count("GET")
    blocks.close()  # type: ignore[attr-defined]
    left.set()
    _wait(lambda: not any(t.name.startswith("dpo-store") for t in threading.enumerate()))
    assert proxy.count("GET") == seen


def test_a_slow_caller_is_not_a_slow_server(
    server: S3Server, proxy: FaultProxy, uri: str, credentials: None, pauses: Pauses
) -> None:
    now = 0.0
    policy = RetryPolicy(slow_window=0.5, slow_bytes=10 * len(DATA))
    timing = replace(pauses.timing(), monotonic=lambda: now)
    read = b""
    for block in open_store(server.options(endpoint=proxy.endpoint), retry=policy, timing=timing).stream(uri, ahead=0):
        read += block
        now += 1.0  # the caller's work; reading takes no time by this clock
    assert read == DATA
    assert proxy.count("GET") == 1


def test_a_broken_stream_gives_what_it_read_first(flaky: Store, proxy: FaultProxy, uri: str) -> None:
    proxy.add("short", after=3 * CHUNK)
    proxy.add("status", times=9, code=403, reason="AccessDenied")
    got = []
    with pytest.raises(AccessDeniedError):
        got.extend(flaky.stream(uri, ahead=len(DATA)))
    assert b"".join(got) == DATA[: 3 * CHUNK]


def test_no_secret_reaches_a_log_or_a_message(
    server: S3Server, flaky: Store, proxy: FaultProxy, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="dpo_store")
    messages = []
    for code, reason in [(503, "SlowDown"), (403, "SignatureDoesNotMatch"), (418, server.secret_key)]:
        proxy.clear()
        proxy.add("status", code=code, reason=reason, times=9)
        with pytest.raises(DPOError) as caught:
            list(flaky.stream(uri, ahead=0))
        messages.append(str(caught.value))
    said = "\n".join([*messages, *(record.getMessage() for record in caplog.records)])
    assert "SlowDown" in said
    assert server.secret_key not in said
    assert server.access_key not in said
