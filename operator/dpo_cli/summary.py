"""The last lines of a run: its results, where they are, and how to continue."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpo_api.errors import Outcome
from dpo_api.metrics import ACCURACY, LOSS, MARGIN, newest_group
from dpo_api.progress import Best, LastWords
from dpo_api.texts import figure, percent
from dpo_cli.metrics_log import MetricsLog, Point
from dpo_cli.report import Written
from dpo_store import join_uri

Row = tuple[str, str]


def ending(words: LastWords, written: Written | None, run_dir: str, checkpoint: int | None, command: str) -> list[Row]:
    """Return (label, text) of every line.

    `checkpoint` is the step of the newest checkpoint that the events reported; `command` continues a stopped run.
    """
    lines: list[Row] = []
    outcome = words.known_outcome
    log = MetricsLog({}) if written is None else written.log
    if outcome is Outcome.Succeeded:
        results = compared(log)
        if results:
            lines.append(("result", results))
        if words.stopped_early:
            lines.append(("stopped", f"early, after step {words.step:,} of {words.total:,}: {words.stopped_early}"))
        if words.best is not None:
            lines.append(("best", best_of(words.best)))
        of = "" if words.model_step in (None, words.step) else f" (of step {words.model_step:,})"
        lines.append(("model", (words.model_uri or join_uri(run_dir, "model")) + of))
        if words.hub_uri is not None:
            lines.append(("hub", words.hub_uri))
    elif outcome is Outcome.Stopped:
        lines.append(("stopped", words.message or _where_stopped(words, run_dir)))
        lines.append(("continue", command))
    elif words.model_uri is not None:  # only the push to the hub failed
        lines.append(("model", words.model_uri))
    elif checkpoint:
        lines.append(("kept", f"checkpoint of step {checkpoint:,}; the same command continues from it"))
    if written is not None:
        lines.append(("report", written.uri))
    return lines


def best_of(best: Best) -> str:
    """Write the best validation, such as "val/loss 0.512 at step 20"."""
    return f"{best.metric} {figure(best.value)} at step {best.step:,}"


def _where_stopped(words: LastWords, run_dir: str) -> str:
    if not words.step:
        return "before the first step"
    total = f" of {words.total:,}" if words.total else ""
    return f"after step {words.step:,}{total}; checkpoint: {join_uri(run_dir, 'checkpoints', f'step-{words.step:06d}')}"


def compared(log: MetricsLog) -> str:
    """Describe the last validation and the first one's loss; without a validation, the training metrics.

    Accuracy and margin have no "before": at the start the policy equals the reference, so both are 0 by definition.
    """
    group = newest_group(log.series)
    parts = [
        _pair("accuracy", log.get(f"{group}/{ACCURACY}")[-1:], percent),
        _pair("loss", log.get(f"{group}/{LOSS}")),
        _pair("margin", log.get(f"{group}/{MARGIN}")[-1:]),
    ]
    results = [part for part in parts if part]
    if not results:
        return ""
    return ("validation: " if group == "val" else "training: ") + " · ".join(results)


def _pair(name: str, points: Sequence[Point], form: Callable[[float], str] = figure) -> str:
    if not points:
        return ""
    last = form(points[-1][1])
    return f"{name} {last} (before: {form(points[0][1])})" if len(points) > 1 else f"{name} {last}"
