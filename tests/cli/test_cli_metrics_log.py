"""Metrics of several attempts become one series with each step once."""

from __future__ import annotations

import json

import pytest

from dpo_api.errors import InvalidDataError
from dpo_cli.metrics_log import Event, attempt_of, merge, parse_events


def train(attempt: int, step: int, loss: float) -> Event:
    return Event(step, attempt, {"train/loss": loss})


def val(attempt: int, step: int, loss: float) -> Event:
    return Event(step, attempt, {"val/loss": loss})


def test_a_resumed_attempt_replaces_the_steps_that_it_trained_again() -> None:
    first = [val(1, 0, 0.7), *(train(1, step, 1.0) for step in range(1, 20)), val(1, 10, 0.6), val(1, 15, 0.5)]
    second = [*(train(2, step, 2.0) for step in range(11, 14))]
    log = merge([*second, *first])
    # The second attempt started at the checkpoint of step 10 and has come to 13: what the first one did beyond is void.
    assert log.get("train/loss") == [(step, 1.0 if step <= 10 else 2.0) for step in range(1, 14)]
    assert log.get("val/loss") == [(0, 0.7), (10, 0.6)]
    assert log.last_step == 13


def test_three_attempts_and_one_that_only_validated() -> None:
    events = [
        *(train(1, step, 1.0) for step in range(1, 6)),
        val(2, 4, 9.0),
        *(train(3, step, 3.0) for step in range(5, 8)),
    ]
    assert merge(events).get("train/loss") == [*((s, 1.0) for s in range(1, 5)), *((s, 3.0) for s in range(5, 8))]
    assert merge(events).get("val/loss") == [(4, 9.0)]


def test_the_last_value_of_a_step_counts() -> None:
    assert merge([train(1, 1, 1.0), train(1, 1, 2.0)]).get("train/loss") == [(1, 2.0)]


def test_events_carry_their_attempt_or_take_the_files() -> None:
    data = b'{"step": 1, "attempt": 4, "train/loss": 1}\n\n{"step": 2, "train/loss": 0.5, "note": "x", "ok": true}\n'
    assert parse_events("m", data, 2) == [Event(1, 4, {"train/loss": 1.0}), Event(2, 2, {"train/loss": 0.5})]


def test_a_torn_last_line_is_skipped() -> None:
    assert parse_events("m", b'{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra') == [train(1, 1, 1.0)]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"train/loss": 1}', b'{"step": "x"}'])
def test_any_other_bad_line_is_named(line: bytes) -> None:
    with pytest.raises(InvalidDataError, match=r"^metrics.jsonl:2: not a JSON object with a step: "):
        parse_events("metrics.jsonl", b'{"step": 1}\n' + line + b"\n" + json.dumps({"step": 3}).encode() + b"\n")


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("metrics.jsonl", 1),
        ("metrics-0003.jsonl", 3),
        ("metrics/attempt-0012.jsonl", 12),
        ("metrics.2.jsonl", 2),
        ("report.html", None),
        ("other-metrics.jsonl", None),
    ],
)
def test_names_of_logs(name: str, attempt: int | None) -> None:
    assert attempt_of(name) == attempt
