"""The report page of a run: tiles, curves, validations and settings in one HTML file without external resources."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from statistics import median
from typing import Any

from dpo_api.errors import Outcome
from dpo_api.metrics import ACCURACY, LOSS, MARGIN, MEMORY_PEAK, MEMORY_PREDICTED, newest_group
from dpo_api.progress import LastWords
from dpo_api.texts import compact, elapsed, percent, size
from dpo_cli.charts import LEFT, RIGHT, WIDTH, Chart, Line, render
from dpo_cli.metrics_log import MetricsLog, Point

VALIDATION_ROWS = 200
"""Most rows of the validation table; the newest ones are kept."""


@dataclass(frozen=True)
class Report:
    """The content of a page. `given` is the spec as the user wrote it, `effective` the same with all defaults.

    Both are JSON objects with the API's field names. `ended` is None while the run is going on, or if its end was not
    recorded.
    """

    name: str
    run_dir: str
    log: MetricsLog
    given: Mapping[str, Any]
    effective: Mapping[str, Any]
    ended: LastWords | None
    drawn_at: datetime


def render_page(report: Report) -> str:
    """Return the page as HTML. It makes no requests, and its Content-Security-Policy forbids them."""
    charts = "".join(render(chart, report.log.last_step) for chart in _charts(report.log))
    curves = f'<h2>Curves</h2><div class="charts">{charts}</div>' if charts else "<p>No step has been logged yet.</p>"
    script = _asset("page.js").replace("LEFT_EDGE", str(LEFT)).replace("RIGHT_EDGE", str(WIDTH - RIGHT))
    drawn = report.drawn_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.name)} · DPO report</title><style>{_asset('page.css')}</style></head><body><main>"
        f"{_head(report)}{_tiles(report.log, report.ended)}{curves}{_validations(report.log)}{_settings(report)}"
        f"<footer>Drawn {drawn} from metrics.jsonl and spec.json by <code>dpo report</code>. Rewards are "
        "β·(log π − log π_ref), summed over the response; accuracy is the share of pairs whose chosen reward is the "
        f"higher one.</footer></main><script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return files("dpo_cli").joinpath(name).read_text("utf-8").strip()


def _head(report: Report) -> str:
    badge, why = "", ""
    if report.ended is not None:
        outcome = report.ended.known_outcome
        css = "good" if outcome is Outcome.Succeeded else "" if outcome is Outcome.Stopped else "bad"
        badge = f'<span class="state {css}">{escape(report.ended.outcome)}</span>'
        said = report.ended.message if css == "bad" else report.ended.stopped_early
        if said:
            early = f"Stopped early after step {report.ended.step:,}: " if css == "good" else ""
            why = f'<p class="why">{escape(early + said)}</p>'
    model = next((source.get("uri", "") for source in report.given.get("model", {}).values()), "")
    data = ", ".join(source.get("uri", "") for source in report.given.get("data", {}).get("train", []))
    facts = [f"model {model}" if model else "", f"data {data}" if data else "", f"run directory {report.run_dir}"]
    if report.ended is not None and report.ended.model_uri:
        facts.append(f"result {report.ended.model_uri}")
    if report.ended is not None and report.ended.hub_uri:
        facts.append(f"pushed to {report.ended.hub_uri}")
    lines = "".join(f'<p class="sub">{escape(line)}</p>' for line in facts if line)
    return f"<header><h1>{escape(report.name)}{badge}</h1>{lines}</header>{why}"


def _tile(name: str, value: str, more: str = "") -> str:
    detail = f'<div class="more">{escape(more)}</div>' if more else ""
    head = f'<div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
    return f'<div class="tile">{head}{detail}</div>'


def _trend(name: str, points: Sequence[Point], *, best: str | None, text: Callable[[float], str] = compact) -> str:
    """One tile: the last value, and below it the first and the best one ("min" or "max")."""
    if not points:
        return ""

    more = f"first {text(points[0][1])}"
    if best is not None and len(points) > 1:
        pick = min if best == "min" else max
        step, value = pick(points, key=lambda point: point[1])
        more += f" · best {text(value)} at step {step:,}"
    return _tile(name, text(points[-1][1]), more)


def _tiles(log: MetricsLog, ended: LastWords | None) -> str:
    group = newest_group(log.series)
    where = "validation" if group == "val" else "train"
    tiles = [
        _trend(f"accuracy, {where}", log.get(f"{group}/{ACCURACY}"), best="max", text=percent),
        _trend(f"loss, {where}", log.get(f"{group}/{LOSS}"), best="min"),
        _trend(f"reward margin, {where}", log.get(f"{group}/{MARGIN}"), best="max"),
    ]
    if ended is not None and ended.best is not None:
        best = ended.best
        exported = ", exported" if ended.model_step == best.step else ""
        tiles.append(_tile(f"best {best.metric}", compact(best.value), f"at step {best.step:,}{exported}"))
    total = ended.total if ended is not None and ended.total else 0
    steps = f"of {total:,} planned" if total and total != log.last_step else ""
    pairs = log.get("train/consumed_samples")
    if pairs:
        steps = " · ".join(part for part in (steps, f"{pairs[-1][1]:,.0f} pairs") if part)
    tiles.append(_tile("steps", f"{log.last_step:,}", steps))
    seconds = [value for _, value in log.get("train/step_time")]
    if seconds:
        tiles.append(
            _tile("step time, median", f"{compact(median(seconds))} s", f"{elapsed(sum(seconds))} of training")
        )
    unit, speeds = throughput(log)
    rates = [value for _, value in speeds]
    if rates:
        tiles.append(_tile(f"{unit} a second, median", compact(median(rates)), f"best {compact(max(rates))}"))
    peak = log.get(MEMORY_PEAK)
    if peak:
        predicted = log.get(MEMORY_PREDICTED)
        more = f"predicted {size(predicted[-1][1])}" if predicted else ""
        tiles.append(_tile("memory of rank 0's GPU, peak", size(max(value for _, value in peak)), more))
    return f'<section class="tiles">{"".join(tiles)}</section>'


def throughput(log: MetricsLog) -> tuple[str, Sequence[Point]]:
    """Return the unit and the series of training speed: the logged tokens per second, else pairs per step time."""
    tokens = log.get("train/tokens_per_second")
    if tokens:
        return "tokens", tokens
    seconds = dict(log.get("train/step_time"))
    speeds: list[Point] = []
    before: Point | None = None
    for step, pairs in log.get("train/consumed_samples"):
        steps, done = (step, pairs) if before is None else (step - before[0], pairs - before[1])
        if seconds.get(step, 0.0) > 0 and steps > 0:
            speeds.append((step, done / steps / seconds[step]))
        before = (step, pairs)
    return "pairs", speeds


def _both(log: MetricsLog, metric: str) -> list[Line]:
    """Training as a line, each validation set as dots."""
    lines = [Line("train", log.get(f"train/{metric}"))]
    sets = [name for name in log.names("val/") if name.split("/")[-1] == metric]
    for number, name in enumerate(sets):
        middle = "/".join(name.split("/")[1:-1])
        lines.append(Line(f"validation {middle}".strip(), log.get(name), 1 + number % 3, "dots"))
    return lines


def _charts(log: MetricsLog) -> list[Chart]:
    terms = [
        Line(name, log.get(f"train/{key}"), colour)
        for colour, (key, name) in enumerate([("preference_loss", "preference"), ("sft_loss", "SFT")])
    ]
    with_sft = any(value != 0 for _, value in log.get("train/sft_loss")) and log.get("train/preference_loss")
    rewards = [
        Line("chosen", log.get("train/rewards_chosen_mean"), 0),
        Line("rejected", log.get("train/rewards_rejected_mean"), 1),
        Line("chosen (validation)", log.get("val/rewards_chosen_mean"), 0, "dots"),
        Line("rejected (validation)", log.get("val/rewards_rejected_mean"), 1, "dots"),
    ]
    unit, speeds = throughput(log)
    margin = [Line("train", log.get(f"train/{MARGIN}")), Line("validation", log.get(f"val/{MARGIN}"), 1, "dots")]
    return [
        Chart("Loss", _both(log, LOSS)),
        Chart("Accuracy", _both(log, ACCURACY), low=0.0, high=1.0, reference=(0.5, "chance")),
        Chart("Rewards", rewards),
        Chart("Reward margin (chosen − rejected)", margin),
        *([Chart("Loss terms", terms)] if with_sft else []),
        Chart(
            "Gradient norm, before clipping", [Line("train", log.get("train/grad_norm"), 2)], low=0.0, cut_spikes=True
        ),
        Chart("Learning rate", [Line("train", log.get("train/lr"), 2, "exact")], low=0.0),
        Chart(f"{unit.capitalize()} a second", [Line("train", speeds, 3)], low=0.0, cut_spikes=True),
        Chart("Step time, seconds", [Line("train", log.get("train/step_time"), 3)], low=0.0, cut_spikes=True),
    ]


def _validations(log: MetricsLog) -> str:
    names = [name for name in log.names("val/") if not name.endswith(("_std", "step_time", "consumed_samples"))]
    if not names:
        return ""
    columns = {name: dict(log.get(name)) for name in names}
    steps = sorted({step for column in columns.values() for step in column})
    head = "".join(f'<th class="n">{escape(name.removeprefix("val/"))}</th>' for name in names)
    body = "".join(
        f'<tr><td class="n">{step:,}</td>'
        + "".join(f'<td class="n">{compact(c[step]) if step in c else ""}</td>' for c in columns.values())
        + "</tr>"
        for step in steps[-VALIDATION_ROWS:]
    )
    cut = f'<p class="note">the last {VALIDATION_ROWS} of {len(steps)}</p>' if len(steps) > VALIDATION_ROWS else ""
    table = f'<table><thead><tr><th class="n">step</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<h2>Validations</h2><div class="scroll">{table}</div>{cut}'


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Return (path, value) of every leaf of a JSON value: `data.train[0].uri`. Lists of plain values are one leaf."""
    if isinstance(value, Mapping) and value:
        return [row for key, item in value.items() for row in flatten(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [row for index, item in enumerate(value) for row in flatten(item, f"{path}[{index}]")]
    if isinstance(value, str):
        return [(path, value)]
    if isinstance(value, list):
        return [(path, ", ".join(item if isinstance(item, str) else json.dumps(item) for item in value) or "none")]
    return [(path, json.dumps(value, ensure_ascii=False))]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{escape(path)}</td><td>{escape(text)}</td></tr>" for path, text in rows)
    return f'<div class="scroll settings"><table><tbody>{body}</tbody></table></div>'


def _settings(report: Report) -> str:
    if not report.given:
        return ""
    given = flatten(report.given)
    known = {path for path, _ in given}
    defaults = [(path, text) for path, text in flatten(report.effective) if path not in known and text != "null"]
    rest = (
        f"<details><summary>Defaults of the {len(defaults)} settings left out</summary>{_table(defaults)}</details>"
        if defaults
        else ""
    )
    return f"<h2>Settings</h2>{_table(given)}{rest}"
