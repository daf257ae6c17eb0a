"""/metrics, /status and /healthz as a scraper, an operator and a kubelet see them."""

import http.client
import math
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dpo_api.errors import AccessDeniedError, PortInUseError
from dpo_api.metrics import METRICS
from dpo_api.progress import Progress
from dpo_trainer.metrics.prometheus import PrometheusMetrics
from dpo_trainer.metrics.server import StatusServer


@pytest.fixture
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics(now=lambda: 1234.5)


@pytest.fixture
def server(metrics: PrometheusMetrics) -> Iterator[StatusServer]:
    running = StatusServer(metrics.registry, port=0, host="127.0.0.1")
    yield running
    running.close()


def get(server: StatusServer, path: str, **headers: str) -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def samples(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def test_an_event_fills_the_series_of_the_table(metrics: PrometheusMetrics, server: StatusServer) -> None:
    metrics.write(7, {"train/loss": 0.25, "train/acc": 0.75, "train/consumed_samples": 56, "train/not_in_table": 3.0})
    metrics.write(7, {"val/acc": 0.5})
    metrics.add("dpo_train_tokens_total", 100)
    metrics.add("dpo_train_tokens_total", 50)
    status, content_type, text = get(server, "/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert samples(text) == {
        "dpo_train_loss": 0.25,
        "dpo_train_reward_accuracy_ratio": 0.75,
        "dpo_train_samples_total": 56.0,
        "dpo_train_steps_total": 7.0,
        "dpo_train_tokens_total": 150.0,
        "dpo_train_last_step_timestamp_seconds": 1234.5,
        "dpo_val_reward_accuracy_ratio": 0.5,
        "dpo_val_last_run_timestamp_seconds": 1234.5,
    }


def test_every_series_of_the_table_is_exported_with_its_kind_and_help(
    metrics: PrometheusMetrics, server: StatusServer
) -> None:
    for index, metric in enumerate(METRICS):
        metrics.set(metric.name, index, **dict.fromkeys(metric.labels, "x"))
    _, _, text = get(server, "/metrics")
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(found) == len(METRICS)
    for index, metric in enumerate(METRICS):
        family = found[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        (sample,) = family.samples
        assert (sample.name, sample.value, set(sample.labels)) == (metric.name, index, set(metric.labels))
    status, content_type, text = get(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert status == 200
    assert content_type.startswith("application/openmetrics-text")
    assert len(list(parse_openmetrics(text))) == len(METRICS)


def test_nan_reaches_the_scraper(metrics: PrometheusMetrics, server: StatusServer) -> None:
    metrics.write(1, {"train/loss": math.nan})
    assert math.isnan(samples(get(server, "/metrics")[2])["dpo_train_loss"])


def test_only_the_tables_names_and_labels(metrics: PrometheusMetrics) -> None:
    with pytest.raises(KeyError):
        metrics.set("dpo_train_mystery", 1)
    with pytest.raises(KeyError, match="reason"):
        metrics.set("dpo_data_dropped_pairs", 1)
    with pytest.raises(ValueError, match="not a counter"):
        metrics.add("dpo_train_loss", 1)
    with pytest.raises(ValueError, match="negative"):
        metrics.add("dpo_train_tokens_total", -1)


def test_status_is_the_newest_progress(server: StatusServer) -> None:
    assert get(server, "/status")[0] == 503
    server.publish(Progress(phase="train", step=1, total=4))
    server.publish(Progress(phase="train", step=2, total=4, metrics={"train/loss": 0.5}))
    status, content_type, text = get(server, "/status?pretty")
    assert (status, content_type) == (200, "application/json")
    assert Progress.from_json(text) == Progress(phase="train", step=2, total=4, metrics={"train/loss": 0.5})


def test_health_head_and_unknown_paths(server: StatusServer) -> None:
    assert get(server, "/healthz")[::2] == (200, "ok\n")
    assert get(server, "/")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("HEAD", "/healthz")
    answer = connection.getresponse()
    assert (answer.status, answer.read(), answer.headers["Content-Length"]) == (200, b"", "3")
    connection.request("GET", "/healthz")  # the same connection goes on
    assert connection.getresponse().read() == b"ok\n"
    connection.close()


def test_a_port_in_use_is_named(metrics: PrometheusMetrics, server: StatusServer) -> None:
    with pytest.raises(PortInUseError, match=rf"port {server.port}: .*in use; choose another with --port"):
        StatusServer(metrics.registry, port=server.port, host="127.0.0.1")
    with pytest.raises(PortInUseError, match=str(server.port)):
        StatusServer(metrics.registry, port=server.port)
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        with pytest.raises(PortInUseError):
            StatusServer(metrics.registry, port=foreign.getsockname()[1])


def test_a_forbidden_port_is_named(metrics: PrometheusMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dpo_trainer.metrics.server._Server.server_bind", refuse)
    with pytest.raises(AccessDeniedError, match="port 80 is not open"):
        StatusServer(metrics.registry, port=80)


def test_all_addresses_are_served(metrics: PrometheusMetrics) -> None:
    running = StatusServer(metrics.registry, port=0)
    try:
        assert get(running, "/healthz")[0] == 200
        if socket.has_dualstack_ipv6():
            with socket.create_connection(("::1", running.port), timeout=10):
                pass
    finally:
        running.close()


def test_a_silent_reader_blocks_neither_others_nor_the_end(metrics: PrometheusMetrics) -> None:
    running = StatusServer(metrics.registry, port=0, host="127.0.0.1")
    with socket.create_connection(("127.0.0.1", running.port)):
        assert get(running, "/healthz")[0] == 200
        closing = threading.Thread(target=running.close)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()


def test_the_port_is_free_again_after_close(metrics: PrometheusMetrics) -> None:
    first = StatusServer(metrics.registry, port=0, host="127.0.0.1")
    get(first, "/healthz")
    first.close()
    second = StatusServer(metrics.registry, port=first.port, host="127.0.0.1")
    assert get(second, "/healthz")[0] == 200
    second.close()


def test_scrapes_during_writes_are_whole(metrics: PrometheusMetrics, server: StatusServer) -> None:
    """An event's series change together: a scrape never sees half of one."""
    stop = threading.Event()

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            metrics.write(step, {"train/loss": step, "train/acc": step, "train/consumed_samples": step})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline = time.monotonic() + 10
        while "dpo_train_loss" not in get(server, "/metrics")[2] and time.monotonic() < deadline:
            pass
        for _ in range(20):
            found = samples(get(server, "/metrics")[2])
            found.pop("dpo_train_last_step_timestamp_seconds")
            assert len(found) == 4
            assert len(set(found.values())) == 1
    finally:
        stop.set()
        writer.join()
