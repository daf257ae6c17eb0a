"""The run's record: strict JSON, each step once after a resume, whole lines whatever kills the writer."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_api.errors import StorageUnavailableError
from dpo_cli.metrics_log import MetricsLog, merge, parse_events
from dpo_store import RetryPolicy, Store, Timing, base_name, open_store
from dpo_testing.faults import FaultProxy, fault_proxy
from dpo_testing.runs import job_of
from dpo_testing.s3server import S3Server, need, s3_server
from dpo_trainer.metrics.hub import Hub
from dpo_trainer.metrics.jsonl import LocalLog, ObjectLog
from dpo_trainer.metrics.writer import Guarded


def events(path: Path) -> list[dict[str, float]]:
    def strict(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=strict) for line in text.splitlines()]


def test_one_object_an_event_with_its_step_first(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    record = LocalLog(path, None)
    record.write(0, {"val/acc": 0.0})
    record.write(1, {"train/loss": 0.69, "train/grad_norm": float("nan"), "train/lr": 9e-07})
    assert events(path) == [{"step": 0, "val/acc": 0.0}, {"step": 1, "train/loss": 0.69, "train/lr": 9e-07}]
    assert path.read_text(encoding="utf-8").startswith('{"step": 0, ')
    record.close()


def test_resume_drops_what_is_past_the_checkpoint_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = LocalLog(path, None)
    for step in range(1, 6):
        record.write(step, {"train/loss": step / 10})
    record.write(3, {"val/acc": 0.5})
    record.close()
    with path.open("ab") as file:
        file.write(b'{"step": 6, "train/lo')
    record = LocalLog(path, 3)
    record.write(3, {"val/acc": 0.5})
    record.write(4, {"train/loss": 0.44})
    record.close()
    assert [(event["step"], max(event)) for event in events(path)] == [
        (1, "train/loss"),
        (2, "train/loss"),
        (3, "train/loss"),
        (3, "val/acc"),
        (4, "train/loss"),
    ]
    assert events(path)[-1]["train/loss"] == 0.44
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_validation_that_the_record_lacks_is_added_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = LocalLog(path, None)
    record.write(3, {"train/loss": 0.3})
    record.close()
    record = LocalLog(path, 3)
    record.write(3, {"val/acc": 0.5})
    record.close()
    assert events(path) == [{"step": 3, "train/loss": 0.3}, {"step": 3, "val/acc": 0.5}]


def test_a_fresh_start_begins_a_new_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    LocalLog(path, None).write(0, {"val/acc": 0.1})
    LocalLog(path, None).write(0, {"val/acc": 0.2})
    assert events(path) == [{"step": 0, "val/acc": 0.2}]


def test_a_foreign_line_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": 1.0}\nhello\n[1]\n{"step": 2, "train/loss": 0.9}\n')
    LocalLog(path, 2).close()
    assert [event["step"] for event in events(path)] == [1, 2]
    assert "metrics.jsonl:2" in caplog.text
    assert "metrics.jsonl:3" in caplog.text


CHILD = textwrap.dedent("""
    import sys
    from pathlib import Path
    from dpo_trainer.metrics.jsonl import LocalLog
    record = LocalLog(Path(sys.argv[1]), None)
    step = 0
    while True:
        step += 1
        record.write(step, {f"train/metric_{k}": k / 7 for k in range(50)})
""")


def child(path: Path, limit: int | None = None) -> "subprocess.Popen[str]":
    def restrict() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restrict,  # noqa: PLW1509 - the test has no threads at this point
    )


def test_sigkill_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with child(path) as process:
        deadline = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < 100_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    steps = [event["step"] for event in events(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 50


def test_a_full_disk_is_an_error_and_the_torn_line_goes_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with child(path, limit=50_000) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 1
    assert "No space left on device" in said
    assert path.stat().st_size == 50_000
    assert not path.read_bytes().endswith(b"\n")
    LocalLog(path, 10_000).close()
    assert len(events(path)) > 10


# -- on an object store


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    need("versitygw")
    with s3_server() as running:
        running.make_bucket("runs")
        yield running


@pytest.fixture
def credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def read_all(store: Store, run_dir: str) -> MetricsLog:
    found = []
    for info in store.list(f"{run_dir}/metrics/"):
        name = base_name(info.uri)
        found += parse_events(name, store.read(info.uri), int(name.removeprefix("attempt-").removesuffix(".jsonl")))
    return merge(found)


@pytest.mark.usefixtures("credentials")
def test_an_object_an_attempt_and_a_reader_that_sees_each_step_once(server: S3Server) -> None:
    store, run_dir = open_store(server.options()), "s3://runs/two-attempts"
    first = ObjectLog(store, run_dir, 1, interval=0.01)
    for step in range(1, 8):
        first.write(step, {"train/loss": step / 10})
    first.flush()
    assert base_name(first.uri) == "attempt-0001.jsonl"
    # Attempt 1 is gone without closing; attempt 2 resumed from step 4.
    second = ObjectLog(store, run_dir, 2)
    for step in (5, 6):
        second.write(step, {"train/loss": step / 100})
    second.close()
    expected = [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.05), (6, 0.06)]
    assert read_all(store, run_dir).get("train/loss") == expected


@pytest.mark.usefixtures("credentials")
def test_events_arrive_without_being_asked_for(server: S3Server) -> None:
    store = open_store(server.options())
    record = ObjectLog(store, "s3://runs/background", 1, interval=0.01)
    record.write(1, {"train/loss": 0.5})
    deadline = time.monotonic() + 30
    while not store.exists(record.uri) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.read(record.uri) == b'{"step": 1, "train/loss": 0.5}\n'
    record.close()


@pytest.mark.usefixtures("credentials")
def test_a_store_that_is_away_stops_nothing_and_gets_everything_later(
    server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    with fault_proxy(server.endpoint) as proxy:
        store = away(server, proxy)
        record = ObjectLog(store, "s3://runs/flaky", 1, interval=0.01)
        guarded = Guarded(record.uri, record)
        proxy.add("status", times=1_000_000, method="PUT", code=503, reason="SlowDown")
        guarded.write(1, {"train/loss": 0.5})
        guarded.flush()
        guarded.write(2, {"train/loss": 0.4})
        guarded.flush()
        assert guarded.failures == 2
        warnings = [entry for entry in caplog.records if entry.name.startswith("dpo_trainer.metrics")]
        assert 1 <= len(warnings) <= 2, "the sink says it once, and its thread at most once"
        assert not open_store(server.options()).exists(record.uri)
        proxy.clear()
        guarded.write(3, {"train/loss": 0.3})
        guarded.close()
    got = read_all(open_store(server.options()), "s3://runs/flaky").get("train/loss")
    assert got == [(1, 0.5), (2, 0.4), (3, 0.3)]


@pytest.mark.usefixtures("credentials")
def test_a_record_that_cannot_be_written_lets_no_checkpoint_come_about(server: S3Server, tmp_path: Path) -> None:
    """A resume would begin after steps that are in no record. Dashboards may be away; the record may not."""
    spec = {"model": {"huggingFace": {"uri": "m"}}, "data": {"train": [{"uri": "d"}]}}
    with fault_proxy(server.endpoint) as proxy:
        hub = Hub(job_of(spec))
        hub.open_sinks(away(server, proxy), "s3://runs/before-a-checkpoint", attempt=1, resume_step=None)
        proxy.add("status", times=1_000_000, method="PUT", code=503, reason="SlowDown")
        hub.write(1, {"train/loss": 0.5})
        with pytest.raises(StorageUnavailableError):
            hub.flush()
        hub.close()  # a failed run is closed too, and says why it failed, not this


@pytest.mark.usefixtures("credentials")
def test_a_second_process_of_one_attempt_continues_its_object(server: S3Server) -> None:
    """It resumes from step 2: what the first wrote up to there stays, what came after is trained again."""
    store, run_dir = open_store(server.options()), "s3://runs/one-number"
    first = ObjectLog(store, run_dir, 7, interval=0.01)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": step / 10})
    first.write(2, {"val/loss": 0.9})
    first.close()
    second = ObjectLog(store, run_dir, 7, 2)
    second.write(2, {"val/loss": 0.8})  # made up for after the resume, where it is there already
    second.write(3, {"train/loss": 0.03})
    second.close()
    got = read_all(store, run_dir)
    assert got.get("train/loss") == [(1, 0.1), (2, 0.2), (3, 0.03)]
    assert got.get("val/loss") == [(2, 0.9)]


def away(server: S3Server, proxy: FaultProxy) -> Store:
    return open_store(
        server.options(endpoint=proxy.endpoint), retry=RetryPolicy(attempts=2), timing=Timing(sleep=lambda _: None)
    )
