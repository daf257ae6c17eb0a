"""Shows the progress of a run: a live screen on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dpo_api.progress import PHASE_TEXTS, Progress
from dpo_api.texts import elapsed
from dpo_cli.rows import PhaseLog, Row

LABEL_WIDTH = 10
BAR_WIDTH = 20
NARROW = 90
"""Below this many columns the progress bar is left out, to leave room for the numbers."""


def clean(text: str) -> str:
    """Return the text on one line without control characters, which file names may contain."""
    return "".join(character if character.isprintable() else " " for character in text)


def line_of(row: Row) -> str:
    """Return a row as one plain line."""
    return f"  {row.label:<{LABEL_WIDTH}} {clean(row.text)}".rstrip()


class Screen(Protocol):
    """Where a run is shown. Used as a context manager, so that the terminal is always restored."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, events: Iterable[Progress], now: float) -> None:
        """Take new events. `now` is Unix seconds."""
        ...

    def say(self, text: str) -> None:
        """Print one line that is not about a phase."""
        ...

    def close(self, now: float) -> None:
        """Print the rows of the phases that were running when the trainer ended."""
        ...


def quiet_for(running: float) -> float:
    """Return the minimum seconds between two lines about a phase that has run this long: from 5 up to 60."""
    return min(60.0, max(5.0, running / 20))


class PlainScreen:
    """One line per phase, and at most one every few seconds in between. No colours, no cursor control; flushed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._phases = PhaseLog()
        self._printed: dict[str, tuple[float, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def show(self, events: Iterable[Progress], now: float) -> None:
        """Print the rows that the events complete, and now and then what is running."""
        for event in events:
            for row in self._phases.feed(event):
                self._finish(row)
        for row in self._phases.running(now):
            at, text = self._printed.get(row.label, (now - row.seconds, ""))
            if row.text != text and now - at >= quiet_for(row.seconds):
                self._printed[row.label] = (now, row.text)
                # The same text is printed when the phase is over, with its duration.
                self.say(line_of(row) + (" …" if row.text in PHASE_TEXTS.values() else ""))

    def say(self, text: str) -> None:
        """Print one line."""
        print(text, file=self._stream, flush=True)

    def close(self, now: float) -> None:
        """Print the phases that were running, with their durations."""
        for row in self._phases.close(now):
            self._finish(row)

    def _finish(self, row: Row) -> None:
        self._printed.pop(row.label, None)
        self.say(f"{line_of(row)}  ({elapsed(row.seconds)})")


class LiveScreen:
    """Finished phases scroll up; running ones are redrawn in place with a progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phases = PhaseLog()
        self._now = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True, get_renderable=self._draw)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, events: Iterable[Progress], now: float) -> None:
        """Print the rows that the events complete, and redraw the others."""
        self._now = now
        for event in events:
            for row in self._phases.feed(event):
                self._console.print(self._text(row, running=False))
        self._live.refresh()

    def say(self, text: str) -> None:
        """Print one line above the rows that are redrawn."""
        self._console.print(Text(text), soft_wrap=True)

    def close(self, now: float) -> None:
        """Print the phases that were running, with their durations."""
        for row in self._phases.close(now):
            self._console.print(self._text(row, running=False))
        self._live.refresh()

    def _draw(self) -> Group:
        return Group(*(self._text(row, running=True) for row in self._phases.running(self._now)))

    def _text(self, row: Row, *, running: bool) -> Text:
        text = Text(f"  {row.label:<{LABEL_WIDTH}} ", style="bold", no_wrap=True, overflow="ellipsis", end="")
        if running and row.share is not None and self._console.width >= NARROW:
            full, empty = ("#", "-") if self._console.options.ascii_only else ("█", "░")
            filled = round(row.share * BAR_WIDTH)
            text.append(full * filled, "cyan").append(empty * (BAR_WIDTH - filled), "dim").append("  ")
        text.append(clean(row.text), "not bold")
        if not (running and row.share is not None):
            text.append(f"  {elapsed(row.seconds)}", "dim not bold")
        text.end = "\n"
        return text


def open_screen(console: Console) -> Screen:
    """Return the live screen for a terminal that can redraw lines, else the plain one."""
    return LiveScreen(console) if console.is_terminal and not console.is_dumb_terminal else PlainScreen(console.file)  # type: ignore[arg-type]
