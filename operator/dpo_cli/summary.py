"""The last lines of a run: what came out, where it lies, how to go on."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_api.errors import Outcome
from dpo_api.progress import LastWords
from dpo_cli.metrics_log import MetricsLog, Point
from dpo_cli.page import margins
from dpo_cli.report import Written
from dpo_cli.rows import number
from dpo_store import join_uri

Row = tuple[str, str]


def ending(words: LastWords, written: Written | None, run_dir: str, checkpoint: int | None, command: str) -> list[Row]:
    """Return (label, text) of every line.

    `checkpoint` is the step of the newest one that the events told of; `command` continues a stopped run.
    """
    lines: list[Row] = []
    outcome = words.known_outcome
    log = MetricsLog({}) if written is None else written.log
    if outcome is Outcome.Succeeded:
        results = compared(log)
        if results:
            lines.append(("result", results))
        lines.append(("model", words.model_uri or join_uri(run_dir, "model")))
    elif outcome is Outcome.Stopped:
        step = words.step or checkpoint or 0
        where = f", checkpoint {join_uri(run_dir, 'checkpoints', f'step-{step:06d}')}" if step else ""
        total = f"/{words.total:,}" if words.total else ""
        lines.append(
            ("stopped", f"at step {step:,}{total}{where}" if step else words.message or "before the first step")
        )
        lines.append(("go on", command))
    elif checkpoint:
        lines.append(("kept", f"checkpoint of step {checkpoint:,}; the same command continues from it"))
    if written is not None:
        lines.append(("report", written.uri))
    return lines


def compared(log: MetricsLog) -> str:
    """Say the last validation beside the first, "accuracy 0.99 (before: 0.52)"; the training metrics without one."""
    prefix = "val/" if log.get("val/loss") else "train/"
    parts = [
        _pair("accuracy", log.get(f"{prefix}acc")),
        _pair("loss", log.get(f"{prefix}loss")),
        _pair("margin", margins(log, prefix)),
    ]
    told = [part for part in parts if part]
    if not told:
        return ""
    return ("validation: " if prefix == "val/" else "training: ") + " · ".join(told)


def _pair(name: str, points: Sequence[Point]) -> str:
    if not points:
        return ""
    last = number(points[-1][1])
    return f"{name} {last} (before: {number(points[0][1])})" if len(points) > 1 else f"{name} {last}"
