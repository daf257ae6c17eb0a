"""The report: charts that show what is there, a page that loads nothing, and the command that draws it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.progress import LastWords
from dpo_cli.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Line, render, smooth, thin, ticks
from dpo_cli.metrics_log import MetricsLog, merge, parse_events
from dpo_cli.page import Report, flatten, render_page
from dpo_testing.cli import Dpo, World
from dpo_testing.s3server import S3Server


class Page(HTMLParser):
    """Tags, their attributes and the text of a page; fails on tags that are closed in the wrong order."""

    VOID = ("meta", "line", "circle", "path", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def events(steps: int) -> list[Mapping[str, Any]]:
    trained = [
        {
            "step": step,
            "train/loss": math.log(2) * 0.97**step,
            "train/acc": 1 - 0.5 * 0.97**step,
            "train/rewards_chosen_mean": 0.01 * step,
            "train/rewards_rejected_mean": -0.02 * step,
            "train/rewards_margin": 0.03 * step,
            "train/lr": 9e-6,
            "train/grad_norm": 40.0 if step == 5 else 2.0 + step % 3 / 10,
            "train/step_time": 0.5,
            "train/consumed_samples": 64 * step,
        }
        for step in range(1, steps + 1)
    ]
    start = {"step": 0, "val/loss": math.log(2), "val/acc": 0.5}
    return [start, *trained, {"step": steps, "val/loss": 0.07, "val/acc": 0.99, "val/heldout/acc": 0.99}]


def log_of(steps: int) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in events(steps)).encode()


SPEC = {"model": {"huggingFace": {"uri": "s3://m/<b>"}}, "data": {"train": [{"uri": "s3://d/x"}]}, "dpo": {"beta": 0.2}}


def page(steps: int = 60, ended: LastWords | None = None, spec: Mapping[str, Any] = SPEC) -> str:
    log = merge(parse_events("m", log_of(steps)) if steps else [])
    effective = {"dpo": {"beta": 0.2, "loss": "dpo"}, "lora": None}
    return render_page(Report("job", "s3://runs/job", log, spec, effective, ended, datetime(2030, 1, 2, tzinfo=UTC)))


def test_the_page_loads_nothing_and_says_so() -> None:
    text = page()
    tags = Page(text).tags
    assert not {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "embed", "base"}
    assert not [attrs for _, attrs in tags if {"src", "href", "srcset", "action"} & attrs.keys()]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", text)
    policy = next(attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert "prefers-color-scheme:dark" in text


def test_tiles_and_tables_show_first_last_and_best() -> None:
    text = Page(page(ended=LastWords(outcome="Succeeded", step=60, total=60))).text
    assert "Succeeded" in text
    assert "accuracy, validation 99.0% first 50.0% · best 99.0% at step 60" in text
    assert "loss, validation 0.07 first 0.693" in text
    assert "steps 60 3,840 pairs" in text
    assert "step time, median 0.5 s 30 s of training" in text
    assert "pairs a second, median 128" in text
    assert "dpo.beta 0.2" in text
    assert "Defaults of the 1 settings left out dpo.loss dpo" in text


def test_the_peak_of_memory_is_shown_beside_its_prediction() -> None:
    log = MetricsLog({"train/memory_peak": [(1, 2**30), (2, 3 * 2**30)], "train/memory_predicted": [(1, 2.5 * 2**30)]})
    text = Page(render_page(Report("x", "runs/x", log, {}, {}, None, datetime(2030, 1, 2, tzinfo=UTC)))).text
    assert "memory of rank 0's GPU, peak 3.0 GiB predicted 2.5 GiB" in text


def test_what_users_wrote_cannot_become_markup() -> None:
    ended = LastWords(outcome="InvalidData", message="<script>alert(1)</script>")
    text = page(ended=ended)
    assert "<script>alert" not in text
    assert "<b>" not in re.sub(r"<b data-line", "", text)
    assert "model s3://m/<b>" in Page(text).text
    assert "<script>alert(1)</script>" in Page(text).text


def test_an_empty_log_and_an_unknown_spec_still_make_a_page() -> None:
    assert "No step has been logged yet." in Page(page(0, spec={})).text


def coordinates(text: str) -> list[tuple[float, float]]:
    paths = re.findall(r'd="M([^"]*)"', text)
    dots = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', text)
    return [(float(a), float(b)) for path in paths for a, b in (point.split(",") for point in path.split("L"))] + [
        (float(a), float(b)) for a, b in dots
    ]


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.booleans(),
    st.sampled_from(["line", "exact", "dots"]),
)
def test_every_point_lies_inside_its_axes(values: list[float], cut: bool, kind: Any) -> None:
    points = [(step, value) for step, value in enumerate(values, 1)]
    figure = render(Chart("x", [Line("a", points, 0, kind)], cut_spikes=cut), len(points))
    Page(figure)
    assert coordinates(figure)
    for x, y in coordinates(figure):
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_lines_are_drawn_where_their_values_are() -> None:
    figure = render(Chart("x", [Line("a", [(0, 0.0), (50, 1.0), (100, 0.5)])], low=0.0, high=1.0), 100)
    drawn = coordinates(figure)
    middle, span = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM - TOP
    assert drawn[1] == pytest.approx((middle, TOP), abs=0.1)
    assert drawn[0] == pytest.approx((LEFT, TOP + span), abs=0.1)
    assert drawn[2] == pytest.approx((WIDTH - RIGHT, TOP + span / 2), abs=0.1)


def test_a_spike_is_cut_off_and_noted() -> None:
    points = [(step, 40.0 if step == 5 else 2.0) for step in range(1, 61)]
    assert "spikes above 2.5 are cut off; the highest is 40 at step 5" in render(
        Chart("norm", [Line("a", points)], cut_spikes=True), 60
    )
    assert "cut" not in render(Chart("norm", [Line("a", [(s, 2.0 + s % 2) for s in range(60)])], cut_spikes=True), 60)


def test_a_series_without_points_draws_nothing() -> None:
    assert render(Chart("x", [Line("a", [])]), 10) == ""


@given(st.floats(-1e4, 1e4), st.floats(1e-6, 1e9))
def test_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    high = low + span
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 12
    assert all(low - span * 1e-6 <= mark <= high + span * 1e-6 for mark in marks)


def test_ticks_of_a_share() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_thinning_keeps_spikes_and_ends() -> None:
    points = [(step, 0.0) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[77] = (77, -9.0)
    kept = thin(points, 100)
    assert len(kept) <= 102
    assert {points[0], points[-1], (4321, 9.0), (77, -9.0)} <= set(kept)
    assert kept == sorted(kept)


def test_smoothing_neither_lags_nor_bends_a_line() -> None:
    slope = [(step, 3.0 * step + 1) for step in range(200)]
    assert smooth(slope) == [(step, pytest.approx(value)) for step, value in slope]


def test_smoothing_averages() -> None:
    saw = [(step, float(step % 2)) for step in range(400)]
    assert all(abs(value - 0.5) < 0.06 for step, value in smooth(saw) if 20 < step < 380)


def test_flatten_names_every_leaf() -> None:
    spec = {"data": {"train": [{"uri": "a"}, {"uri": "b"}]}, "betas": [0.9, 0.98], "x": None, "formats": ["peft"]}
    assert flatten(spec) == [
        ("data.train[0].uri", "a"),
        ("data.train[1].uri", "b"),
        ("betas", "0.9, 0.98"),
        ("x", "null"),
        ("formats", "peft"),
    ]


def run_directory(world: World) -> Path:
    folder = world.folder / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(log_of(20))
    spec = {
        "apiVersion": "dpo-operator.dev/v1alpha1",
        "kind": "DPOJob",
        "metadata": {"name": "tiny"},
        "spec": {**world.spec, "transformerEngine": {"attention": False}},  # a field that 0.1.0 had
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


def test_the_command_draws_a_run_directory(world: World, dpo: Dpo) -> None:
    folder = run_directory(world)
    said = dpo("report", str(folder))
    assert (said.code, said.out.strip()) == (0, f"{folder}/report.html")
    text = Page((folder / "report.html").read_text()).text
    assert "accuracy, validation 99.0%" in text
    assert "training.globalBatchSize 10" in text
    assert "training.learningRate 9e-06" in text, "defaults are shown too"


def test_a_spec_of_another_version_is_shown_unchanged(world: World, dpo: Dpo) -> None:
    folder = run_directory(world)
    (folder / "spec.json").write_text(json.dumps({"metadata": {"name": "later"}, "spec": {"new": {"field": 7}}}))
    assert dpo("report", str(folder)).code == 0
    text = Page((folder / "report.html").read_text()).text
    assert "later" in text
    assert "new.field 7" in text


@pytest.mark.parametrize(
    ("name", "text", "code", "message"),
    [
        (None, "", 11, "neither metrics.jsonl nor spec.json is here; is it a run directory?"),
        ("spec.json", "{", 3, "spec.json: not JSON"),
        ("metrics.jsonl", "x\n{}\n", 3, "metrics.jsonl:1: not a JSON object with a step: x"),
    ],
)
def test_mistakes(world: World, dpo: Dpo, name: str | None, text: str, code: int, message: str) -> None:
    if name is not None:
        (world.folder / "run").mkdir()
        (world.folder / "run" / name).write_text(text)
    said = dpo("report", "run")
    assert (said.code, said.out) == (code, "")
    assert message in said.err


def test_a_run_directory_in_s3_with_one_log_an_attempt(
    world: World, dpo: Dpo, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    s3.make_bucket("reports")
    client = s3.client()
    client.put_object(Bucket="reports", Key="job/metrics-0001.jsonl", Body=log_of(20))
    client.put_object(Bucket="reports", Key="job/metrics-0002.jsonl", Body=b'{"step": 11, "train/loss": 5.0}\n')
    said = dpo("report", "s3://reports/job", "--endpoint", s3.endpoint)
    assert (said.code, said.out.strip()) == (0, "s3://reports/job/report.html")
    text = Page(client.get_object(Bucket="reports", Key="job/report.html")["Body"].read().decode()).text
    assert "steps 11" in text
