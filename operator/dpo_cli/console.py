"""Prints findings, errors and notes, to a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from dpo_api.errors import Outcome
from dpo_api.findings import Finding
from dpo_api.texts import counted
from dpo_cli.screen import clean

STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the exit code to `main`; rich's own is 1, which means an internal error here."""
        self.quiet = True
        raise BrokenPipeError


def stdout() -> Console:
    """Return a console for results: no markup, no highlighting, no wrapping of piped output."""
    return _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def stderr() -> Console:
    """Return a console for errors."""
    return _Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def headline(findings: Sequence[Finding]) -> str:
    """Return "2 errors, 1 warning", or "valid" with the warnings, if any."""
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    parts = [counted(errors, "error")] if errors else ["valid"]
    return ", ".join(parts + ([counted(warnings, "warning")] if warnings else []))


def print_findings(console: Console, findings: Iterable[Finding]) -> None:
    """Print one finding per line: errors, then warnings, then notes; the order within each kind is kept."""
    order = list(STYLES)
    for finding in sorted(findings, key=lambda item: order.index(item.level)):
        text = Text(f"  {finding.level:<8} ", style=STYLES[finding.level])
        first, *more = str(finding).splitlines()
        text.append(clean(first), "not bold default")
        if finding.line is not None:
            text.append(f" (line {finding.line})", "not bold dim default")
        elif finding.source == "--set":
            text.append(" (from --set)", "not bold dim default")
        console.print(text)
        for line in more:
            console.print(f"{'':<11}{clean(line)}")


def print_error(console: Console, outcome: Outcome, message: str) -> None:
    """Print the message of a failure, which may have several lines."""
    first, *more = message.splitlines() or [outcome.description]
    console.print(Text("error", style=STYLES["error"]).append(f"  {clean(first)}", "not bold default"))
    for line in more:
        console.print(f"{'':<7}{clean(line)}")
    if outcome is Outcome.Internal:
        console.print(Text("       this is an internal error: please report it with the lines above", style="dim"))
