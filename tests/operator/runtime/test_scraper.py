"""How the operator asks a trainer, over real connections: what it takes, what it refuses, and that it then goes on."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_api.progress import Progress
from dpo_operator.runtime import scraper
from dpo_operator.runtime.client import Client
from dpo_operator.runtime.scraper import MAX_BYTES, Scraper, pace, together
from dpo_operator.runtime.trust import Trust
from dpo_operator.types import Scrape, ScrapeTarget
from dpo_testing.faketrainer import FakeTrainer
from dpo_testing.pki import Authority
from dpo_trainer.metrics.credentials import Credentials
from dpo_trainer.metrics.prometheus import PrometheusMetrics
from dpo_trainer.metrics.server import StatusServer

KEY = ("team", "job")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def trainer(port: int) -> Iterator[FakeTrainer]:
    with FakeTrainer("127.0.0.1", port) as trainer:
        trainer.say(step=7, total=9)
        yield trainer


def no_login() -> None:
    raise AssertionError("a pod is asked at its own address, past the API server")


async def ask(port: int, ip: str = "127.0.0.1", trust: Trust | None = None, *, https: bool = False) -> Scrape:
    """Return the first answer of a scraper."""
    told = asyncio.Event()
    client = Client(no_login, user_agent="test")  # type: ignore[arg-type]
    asker = Scraper(client, "pod-ip", lambda _: told.set(), interval=60, write_interval=60, trust=trust)
    asker.aim(KEY, ScrapeTarget(child="job-1", namespace="team", pod="job-1-master-0", ip=ip, port=port, https=https))
    async with asyncio.timeout(30):
        await told.wait()
    answer = asker.newest(KEY)
    await asker.close()
    assert answer is not None
    return answer


def test_a_trainer_says_how_far_it_is(trainer: FakeTrainer, port: int) -> None:
    answer = asyncio.run(ask(port))
    assert answer.progress is not None
    assert (answer.progress.step, answer.progress.total, answer.error) == (7, 9, "")


def test_a_redirect_is_not_followed(trainer: FakeTrainer, port: int) -> None:
    trainer.status, trainer.headers = 302, {"Location": f"http://127.0.0.1:{port}/elsewhere"}
    answer = asyncio.run(ask(port))
    assert answer.progress is None
    assert answer.error == "job-1-master-0: no /status response: HTTP 302"
    assert trainer.asked == 1


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 64 * MAX_BYTES])
def test_a_long_answer_is_not_taken(trainer: FakeTrainer, port: int, size: int) -> None:
    trainer.body = b" " * size
    assert "larger than 65536 bytes" in asyncio.run(ask(port)).error


def test_an_answer_of_the_greatest_size_is(trainer: FakeTrainer, port: int) -> None:
    trainer.body = trainer.body.ljust(MAX_BYTES)
    assert asyncio.run(ask(port)).progress is not None


def test_a_slow_answer_is_not_waited_for(trainer: FakeTrainer, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraper, "SECONDS", 0.2)
    trainer.delay = 5.0
    assert "timed out after" in asyncio.run(ask(port)).error


def test_a_refused_connection_is_a_failure(port: int) -> None:
    assert "no /status response" in asyncio.run(ask(port)).error


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (b"", "closed connection"),
        (b"\xff\x00 garbage\r\n\r\n", "no /status response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "no /status response"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, "headers"),
        (b"HTTP/1.1 200 OK\r\n\r\n[1, 2]", "invalid /status response"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 60_000, "invalid /status response"),
    ],
)
def test_an_invalid_answer_is_a_failure(port: int, said: bytes, word: str) -> None:
    assert word in asyncio.run(_of(said, port)).error


def test_an_answer_in_pieces_is_put_together(port: int) -> None:
    said = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"phase":\r\n8\r\n"train"}\r\n0\r\n\r\n'
    answer = asyncio.run(_of(said, port))
    assert answer.progress is not None
    assert answer.progress.phase == "train"


async def _of(said: bytes, port: int) -> Scrape:
    """Ask a server that says these bytes and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", port):
        return await ask(port)


def test_a_new_phase_is_reported_at_once_and_mere_progress_is_not(trainer: FakeTrainer, port: int) -> None:
    async def follow() -> list[int]:
        told: list[float] = []
        client = Client(no_login, user_agent="test")  # type: ignore[arg-type]
        asker = Scraper(client, "pod-ip", lambda _: told.append(time.monotonic()), interval=0.05, write_interval=600)
        asker.aim(KEY, ScrapeTarget(child="job-1", namespace="team", pod="p", ip="127.0.0.1", port=port))
        counts = []
        for step in (8, 9, 10):
            trainer.say(step=step, total=90)
            await _until(lambda step=step: _step(asker) == step)  # type: ignore[misc]
        counts.append(len(told))
        trainer.say(step=10, total=90, phase="validate")
        await _until(lambda: len(told) == 2)
        counts.append(len(told))
        asker.aim(KEY, None)
        assert asker.newest(KEY) is None
        await asker.close()
        return counts

    assert asyncio.run(follow()) == [1, 2]


def _step(asker: Scraper) -> int | None:
    answer = asker.newest(KEY)
    return answer.progress.step if answer is not None and answer.progress is not None else None


async def _until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not look():
            await asyncio.sleep(0.01)


def test_a_pod_that_was_asked_before_is_not_asked_at_once(trainer: FakeTrainer, port: int) -> None:
    """After a restart, the requests to a thousand jobs are spread over an interval; a new job is asked at once."""

    async def scenario() -> tuple[int, int]:
        client = Client(no_login, user_agent="test")  # type: ignore[arg-type]
        asker = Scraper(client, "pod-ip", lambda _: None, interval=10**9, write_interval=60)
        target = ScrapeTarget(child="job-1", namespace="team", pod="p", ip="127.0.0.1", port=port)
        asker.aim(KEY, target, known=True)
        asker.aim(("team", "new"), target)
        await _until(lambda: asker.newest(("team", "new")) is not None)
        counts = trainer.asked, sum(asker.newest(key) is not None for key in (KEY, ("team", "new")))
        await asker.close()
        return counts

    assert asyncio.run(scenario()) == (1, 1)


def test_many_trainers_are_asked_less_often_each() -> None:
    """All together are asked at most eight times a second; a few, as often as the setting says."""
    assert [pace(30, jobs) for jobs in (1, 240, 1000)] == [30, 30, 125]


def test_trainers_are_asked_at_shared_moments() -> None:
    """A question alone costs the operator twice as much as one of several."""
    now = 1234.567
    ends = [now + together(now, 24 + step / 10) for step in range(120)]
    assert {round(end, 6) for end in ends} == {1258, 1260, 1262, 1264, 1266, 1268, 1270}
    assert all(abs(together(now, wait) - wait) <= wait / 20 for wait in (0.05, 1, 6, 30))


# -- trainers that serve HTTPS ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Secret as the installer makes it: the trainer mounts three of its keys, the operator two."""
    folder = tmp_path_factory.mktemp("secret")
    authority = Authority("metrics")
    pair = authority.server("dpo-trainer", ["dpo-trainer"])
    files = {
        "tls.crt": pair.certificate,
        "tls.key": pair.key,
        "ca.crt": authority.pair.certificate,
        "token": b"t0ken\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def secured(secrets: Path) -> Iterator[StatusServer]:
    server = StatusServer(PrometheusMetrics().registry, 0, "127.0.0.1", Credentials(secrets))
    server.publish(Progress(phase="train", step=3, total=9))
    yield server
    server.close()


def test_a_trainer_with_a_certificate_is_asked_with_the_token(secured: StatusServer, secrets: Path) -> None:
    answer = asyncio.run(ask(secured.port, trust=Trust(secrets, "dpo-trainer"), https=True))
    assert answer.error == ""
    assert answer.progress is not None
    assert (answer.progress.step, answer.progress.total) == (3, 9)


def test_a_wrong_token_is_refused(secured: StatusServer, secrets: Path, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes((secrets / "ca.crt").read_bytes())
    (tmp_path / "token").write_text("wrong")
    answer = asyncio.run(ask(secured.port, trust=Trust(tmp_path, "dpo-trainer"), https=True))
    assert (answer.progress, answer.error) == (None, "job-1-master-0: no /status response: HTTP 401")


def test_another_name_or_another_authority_is_not_asked(secured: StatusServer, secrets: Path, tmp_path: Path) -> None:
    assert (
        "CERTIFICATE_VERIFY_FAILED" in asyncio.run(ask(secured.port, trust=Trust(secrets, "other"), https=True)).error
    )
    (tmp_path / "ca.crt").write_bytes(Authority("another").pair.certificate)
    (tmp_path / "token").write_text("t0ken")
    answer = asyncio.run(ask(secured.port, trust=Trust(tmp_path, "dpo-trainer"), https=True))
    assert "CERTIFICATE_VERIFY_FAILED" in answer.error


@pytest.mark.parametrize(
    ("token", "word"), [(None, "token"), ("", "one word of printable ASCII"), ("a\r\nX: y", "one word of printable")]
)
def test_a_token_that_cannot_be_sent_is_named(
    secured: StatusServer, secrets: Path, tmp_path: Path, token: str | None, word: str
) -> None:
    (tmp_path / "ca.crt").write_bytes((secrets / "ca.crt").read_bytes())
    if token is not None:
        (tmp_path / "token").write_text(token)
    error = asyncio.run(ask(secured.port, trust=Trust(tmp_path, "dpo-trainer"), https=True)).error
    assert word in error
    assert str(tmp_path / "token") in error


def test_a_pod_from_before_the_certificate_is_asked_without_the_token(
    trainer: FakeTrainer, port: int, secrets: Path
) -> None:
    answer = asyncio.run(ask(port, trust=Trust(secrets, "dpo-trainer")))
    assert answer.progress is not None
    assert "Authorization" not in trainer.heard


def test_a_plain_server_in_place_of_a_trainer_does_not_get_the_token(
    trainer: FakeTrainer, port: int, secrets: Path
) -> None:
    assert asyncio.run(ask(port, trust=Trust(secrets, "dpo-trainer"), https=True)).progress is None
    assert trainer.asked == 0


def test_the_proxy_of_the_api_server_cannot_pass_on_the_token(secrets: Path) -> None:
    async def scenario() -> str:
        client = Client(no_login, user_agent="test")  # type: ignore[arg-type]
        asker = Scraper(client, "api-proxy", lambda _: None, interval=60, write_interval=60, trust=Trust(secrets, "x"))
        target = ScrapeTarget(child="job-1", namespace="team", pod="p", ip="127.0.0.1", port=1, https=True)
        asker.aim(KEY, target)
        await _until(lambda: asker.newest(KEY) is not None)
        answer = asker.newest(KEY)
        await asker.close()
        return answer.error if answer is not None else ""

    assert "token, which the API server's proxy does not pass on" in asyncio.run(scenario())
