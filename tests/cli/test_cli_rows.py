"""The screen of a run: rows from events, plain lines in a log, a live picture on a terminal."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

from dpo_api.progress import Phase, Progress
from dpo_cli.rows import PhaseLog
from dpo_cli.screen import LiveScreen, PlainScreen, open_screen, quiet_for

START = 1_700_000_000.0


def event(phase: Phase, at: float, **fields: Any) -> Progress:
    return Progress(phase=phase, observed_at=START + at, **fields)


def plain(*events: Progress, end: float | None = None) -> list[str]:
    """Show events at their own times; return the lines."""
    stream = io.StringIO()
    screen = PlainScreen(stream)
    for item in events:
        screen.show([item], item.observed_at)
    if end is not None:
        screen.close(START + end)
    return stream.getvalue().splitlines()


TRAIN = {"train/loss": 0.118, "train/acc": 0.98, "train/rewards_margin": 3.1}


def test_a_whole_run() -> None:
    lines = plain(
        event("starting", 0),
        event("index", 1, done=256, message="train: 30,000 tokens"),
        event("index", 1.2, message="512 pairs, 0 dropped, 61,440 tokens, longest 96"),
        event("reference", 1.4, done=0, of=512),
        event("reference", 3, done=512, of=512, message="cached: 7f3a"),
        event("validate", 3.5, total=4),
        event("train", 4, step=1, total=4, metrics={"val/loss": 0.693, "val/acc": 0.52, "train/loss": 0.7}),
        event("train", 5, step=4, total=4, tokens_per_second=12340.0, eta_seconds=0.0, metrics=TRAIN),
        event("checkpoint", 5, step=4, total=4, message="step 4"),
        event("export", 47, step=4, total=4, message="Hugging Face → runs/q/model"),
        event("done", 48, step=4, total=4),
    )
    assert lines == [
        "  start      starting the trainer  (1.0 s)",
        "  index      512 pairs, 0 dropped, 61,440 tokens, longest 96  (0.4 s)",
        "  reference  512/512 pairs  cached: 7f3a  (2.1 s)",
        "  val        step 0  loss 0.693  acc 0.52  (0.5 s)",
        "  checkpoint step 4  (42 s)",
        "  train      step 4/4  loss 0.118  acc 0.98  margin 3.10  12,340 tok/s  (43 s)",
        "  export     Hugging Face → runs/q/model  (1.0 s)",
    ]


def test_validations_show_their_own_results_not_the_last_ones() -> None:
    log = PhaseLog()
    log.feed(event("train", 0, step=1, total=9, metrics={"val/loss": 0.69, "val/acc": 0.5}))
    log.feed(event("validate", 1, step=1, total=9, metrics={"val/loss": 0.69, "val/acc": 0.5}))
    training, validation = log.running(START + 2)
    assert (training.label, validation.text) == ("train", "step 1")
    [row] = log.feed(event("train", 3, step=2, total=9, metrics={"val/loss": 0.5, "val/acc": 0.75}))
    assert (row.label, row.text, row.seconds) == ("val", "step 1  loss 0.500  acc 0.75", 2.0)


def test_validations_and_steps_that_follow_quickly_are_not_lost() -> None:
    """Between two validations there may be no event of training: steps are reported ten times a second at most."""
    log = PhaseLog()
    log.feed(event("train", 0, step=1, total=9, metrics={"train/loss": 0.7}))
    log.feed(event("validate", 1, step=1, total=9, metrics={"val/loss": 0.69}))
    [row] = log.feed(event("validate", 2, step=2, total=9, metrics={"val/loss": 0.69, "train/loss": 0.6}))
    assert (row.label, row.text) == ("val", "step 1  loss 0.690")
    log.feed(event("validate", 3, step=2, total=9, metrics={"val/loss": 0.5, "train/loss": 0.6}))
    validation, training = log.feed(event("export", 4, step=2, total=9, metrics={"val/loss": 0.5, "train/loss": 0.6}))
    assert (validation.text, training.text) == ("step 2  loss 0.500", "step 2/9  loss 0.600")


def test_the_sets_of_a_phase_have_rows_of_their_own() -> None:
    lines = plain(
        event("reference", 0, done=0, of=512, message="train"),
        event("reference", 1, done=512, of=512, message="train"),
        event("reference", 2, done=64, of=64, message="heldout"),
        end=3,
    )
    assert lines == ["  reference  512/512 pairs  train  (2.0 s)", "  reference  64/64 pairs  heldout  (1.0 s)"]


def test_the_remaining_time_is_shown_while_there_is_some() -> None:
    log = PhaseLog()
    log.feed(event("train", 0, step=1, total=9, eta_seconds=80.0))
    assert log.running(START + 1)[0].text == "step 1/9  ETA 1:20"
    assert log.close(START + 1)[0].text == "step 1/9"


def test_sft_has_no_accuracy() -> None:
    [line] = plain(event("train", 0, step=1, total=2, metrics={"train/loss": 2.5}), end=1)
    assert line == "  train      step 1/2  loss 2.50  (1.0 s)"


def test_a_log_gets_a_line_every_few_seconds_at_most() -> None:
    steps = [event("train", 0.1 * k, step=k, total=1000, metrics={"train/loss": 0.5}) for k in range(1, 1001)]
    lines = plain(*steps)  # 100 seconds
    assert len(lines) == 19
    assert lines[0].startswith("  train      step 51/1,000")
    day = [event("train", 10.0 * k, step=k, total=8640) for k in range(8640)]
    assert len(plain(*day)) < 24 * 60 + 40


def test_a_phase_that_says_nothing_new_is_not_repeated() -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    screen.show([event("starting", 0, message="loading the model")], START)
    for second in range(600):
        screen.show([], START + second)
    assert stream.getvalue() == "  start      loading the model\n"


def test_the_gaps_between_lines_grow() -> None:
    assert [quiet_for(seconds) for seconds in (0, 60, 200, 1200, 36000)] == [5, 5, 10, 60, 60]


def test_no_control_character_reaches_a_log() -> None:
    [line] = plain(event("export", 0, message="a\x1b[31mb\rc\nd\x07"), end=1)
    assert line == "  export     a [31mb c d  (1.0 s)"


def terminal(width: int = 120, **options: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    settings = {"force_terminal": True, "color_system": "standard", "_environ": {"TERM": "xterm"}} | options
    return Console(file=stream, width=width, **settings), stream


def test_a_terminal_gets_the_live_screen_and_a_pipe_plain_lines() -> None:
    console, _ = terminal()
    assert isinstance(open_screen(console), LiveScreen)
    assert isinstance(open_screen(Console(file=io.StringIO())), PlainScreen)
    dumb, _ = terminal(_environ={"TERM": "dumb"})
    assert isinstance(open_screen(dumb), PlainScreen)


def live(console: Console, *events: Progress) -> None:
    with open_screen(console) as screen:
        for item in events:
            screen.show([item], item.observed_at)
        screen.close(events[-1].observed_at + 1)


def test_the_bar_shows_the_share_of_steps() -> None:
    console, stream = terminal()
    live(console, event("train", 0, step=13, total=52, metrics=TRAIN, eta_seconds=9.0))
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "train      " + "█" * 5 + "░" * 15 + "  step 13/52  loss 0.118" in drawn


def test_a_narrow_terminal_keeps_the_numbers_and_loses_the_bar() -> None:
    console, stream = terminal(60)
    live(console, event("train", 0, step=13, total=52, metrics=TRAIN, eta_seconds=9.0))
    assert "█" not in stream.getvalue()
    assert "step 13/52  loss 0.118" in stream.getvalue()


def test_no_color_is_honoured() -> None:
    console, stream = terminal(_environ={"TERM": "xterm", "NO_COLOR": "1"})
    live(console, event("train", 0, step=13, total=52, metrics=TRAIN))
    assert not any(f"\x1b[{code}m" in stream.getvalue() for code in ("36", "31", "33", "32"))


def test_pairs_that_were_read_are_counted_although_the_total_is_unknown() -> None:
    [line] = plain(event("index", 0, done=12_000, message="train: 5,000,000 tokens"), end=2)
    assert line == "  index      12,000 pairs  train: 5,000,000 tokens  (2.0 s)"
