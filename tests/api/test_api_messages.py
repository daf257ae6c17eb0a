"""Outcomes, typed errors, and the two messages of a running trainer."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_api import errors
from dpo_api.errors import DPOError, Outcome
from dpo_api.progress import LAST_WORDS_MAX_BYTES, LastWords, Progress

TABLE = {
    "Succeeded": (0, "none"),
    "Internal": (1, "retryable"),
    "InvalidSpec": (2, "permanent"),
    "InvalidData": (3, "permanent"),
    "InvalidModel": (4, "permanent"),
    "NonFinite": (5, "permanent"),
    "OutOfMemory": (6, "permanent"),
    "NoSpace": (7, "permanent"),
    "IncompatibleCheckpoint": (8, "permanent"),
    "Fenced": (9, "permanent"),
    "AccessDenied": (10, "permanent"),
    "NotFound": (11, "permanent"),
    "PortInUse": (12, "permanent"),
    "Usage": (64, "permanent"),
    "StorageUnavailable": (74, "retryable"),
    "Communication": (75, "retryable"),
    "LayoutTooLarge": (76, "infrastructure"),
    "DeviceFailed": (77, "infrastructure"),
    "WrongLayout": (13, "permanent"),
    "Stopped": (143, "infrastructure"),
}


def test_the_table_of_outcomes_is_a_contract() -> None:
    assert {o.name: (o.exit_code, o.retry) for o in Outcome} == TABLE
    assert all(o.value == o.name and o.description.endswith(".") for o in Outcome)


def test_exit_codes_read_back() -> None:
    assert [Outcome.of_exit_code(o.exit_code) for o in Outcome] == list(Outcome)
    assert Outcome.of_exit_code(137) is None


def test_every_failure_has_its_error() -> None:
    classes = {cls.outcome: cls for cls in DPOError.__subclasses__() if cls.__module__ == errors.__name__}
    assert set(classes) == set(Outcome) - {Outcome.Succeeded}
    for outcome, cls in classes.items():
        assert cls.__name__ == f"{outcome.name}Error"
        assert cls("x").exit_code == outcome.exit_code


def test_progress_is_one_line_of_strict_json() -> None:
    progress = Progress(
        phase="train",
        step=3,
        total=10,
        epoch=0.3,
        eta_seconds=math.inf,
        tokens_per_second=math.nan,
        metrics={"train/loss": 0.5, "train/acc": math.nan, "train/grad_norm": math.inf},
        observed_at=1.5,
        attempt=2,
    )
    text = progress.to_json()
    assert "\n" not in text
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert value["metrics"] == {"train/loss": 0.5}
    assert "etaSeconds" not in value
    assert value["observedAt"] == 1.5
    assert Progress.from_json(text) == progress


def test_progress_of_a_newer_trainer_is_read() -> None:
    assert Progress.from_json('{"phase": "train", "step": 1, "somethingNew": true}').step == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"phase": "dance"}', '{"phase": "train", "step": -1}'])
def test_nonsense_is_no_progress(text: str) -> None:
    with pytest.raises(ValidationError):
        Progress.from_json(text)


@given(
    message=st.text(max_size=9000),
    names=st.lists(st.text(min_size=1, max_size=60), max_size=200),
    uri=st.text(max_size=3000),
)
def test_last_words_fit_and_keep_the_outcome(message: str, names: list[str], uri: str) -> None:
    words = LastWords(
        outcome="InvalidData", message=message, metrics=dict.fromkeys(names, 1.25), run_dir=uri, model_uri=uri, step=7
    )
    text = words.to_json()
    assert len(text.encode("utf-8", "surrogatepass")) <= LAST_WORDS_MAX_BYTES
    read = LastWords.from_json(text)
    assert (read.outcome, read.step) == ("InvalidData", 7)
    assert message.startswith(read.message.removesuffix("…"))
    assert read.run_dir in {uri, None}


@pytest.mark.parametrize("letter", ["x", "é", '"', "\n", "\U0001f600"])
def test_the_longest_last_words_fit(letter: str) -> None:
    uri = "s3://bucket/" + "k" * 1000
    words = LastWords(
        outcome="IncompatibleCheckpoint",
        message=letter * 9000,
        metrics={f"val/source-{i}/rewards_rejected_mean": 0.1234567890123 for i in range(300)},
        run_dir=uri,
        model_uri=uri,
        step=10**8,
        total=10**8,
        attempt=10**6,
    )
    text = words.to_json()
    assert len(text.encode()) <= LAST_WORDS_MAX_BYTES
    read = LastWords.from_json(text)
    assert (read.run_dir, read.model_uri) == (uri, uri)
    assert len(read.message) > 200


def test_short_last_words_are_whole() -> None:
    words = LastWords(outcome="Succeeded", message="fine", metrics={"val/acc": 0.9}, run_dir="s3://r/x")
    assert LastWords.from_json(words.to_json()) == words
    assert words.known_outcome is Outcome.Succeeded
    assert LastWords(outcome="FromTheFuture").known_outcome is Outcome.Internal


def test_metric_names_follow_prometheus() -> None:
    from dpo_api.metrics import BY_KEY, METRICS

    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    keys = [metric.key for metric in METRICS if metric.key]
    assert len(keys) == len(set(keys)) == len(BY_KEY)
    for metric in METRICS:
        assert re.fullmatch(r"dpo_[a-z0-9_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.help.endswith(".")
        assert "step" not in metric.labels


@pytest.mark.parametrize(
    ("keys", "group"),
    [
        ({"train/acc", "val/acc"}, "val"),
        ({"train/acc", "val/loss"}, "train"),  # the validation before the first step reports no accuracy
        ({"val/loss"}, "val"),
        ({"train/loss", "val/loss"}, "val"),  # SFT alone
        ({"train/loss"}, "train"),
        (set(), "train"),
    ],
)
def test_validation_counts_once_it_has_scored(keys: set[str], group: str) -> None:
    from dpo_api.metrics import newest_group

    assert newest_group(keys) == group


def test_metrics_of_the_reference_have_their_series() -> None:
    from dpo_api.metrics import BY_KEY

    shared = "loss sft_loss preference_loss acc rewards_chosen_mean rewards_rejected_mean rewards_all_mean"
    for key in [*shared.split(), "rewards_all_std"]:
        assert f"train/{key}" in BY_KEY
        assert f"val/{key}" in BY_KEY
    for key in ["train/grad_norm", "train/lr", "train/consumed_samples", "train/step_time", "train/epoch"]:
        assert key in BY_KEY
    assert "val/validation_step_time" in BY_KEY
