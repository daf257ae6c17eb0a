"""Speed, time left and the two places where progress can be read."""

from pathlib import Path

import pytest

from dpo_api.progress import Progress
from dpo_trainer.metrics.progress import QUIET_SECONDS, WINDOW_STEPS, ProgressTracker


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Board:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []

    def publish(self, progress: Progress) -> None:
        self.seen.append(progress)


def lines(path: Path) -> list[Progress]:
    return [Progress.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def tracker(clock: Clock, events: Path) -> ProgressTracker:
    return ProgressTracker(events, Board(), clock=clock, now=lambda: clock() + 1e9)


def take(tracker: ProgressTracker, clock: Clock, step: int, seconds: float, tokens: int = 100) -> Progress:
    clock.seconds += seconds
    tracker.step(step, epoch=step / 10, seconds=seconds, tokens=tokens, pairs=4, metrics={"train/loss": 1 / step})
    return tracker.newest


def test_speed_and_time_left(tracker: ProgressTracker, clock: Clock) -> None:
    tracker.begin(3)
    tracker.plan(step=0, total=10)
    take(tracker, clock, 1, seconds=2.0, tokens=100)
    newest = take(tracker, clock, 2, seconds=3.0, tokens=400)
    assert newest.tokens_per_second == pytest.approx(500 / 5)
    assert newest.pairs_per_second == pytest.approx(8 / 5)
    assert newest.eta_seconds == pytest.approx(8 * 2.5)
    assert (newest.phase, newest.step, newest.total, newest.epoch, newest.attempt) == ("train", 2, 10, 0.2, 3)
    assert newest.observed_at == pytest.approx(1e9 + 1005)


def test_the_loss_of_step_one_is_kept_and_a_resumed_run_has_none(tracker: ProgressTracker, events: Path) -> None:
    tracker.plan(step=0, total=10)
    tracker.measured({"val/preference_loss": 0.69}, at_start=0.68)
    assert tracker.newest.first_preference_loss == 0.69
    assert tracker.newest.expected_first_preference_loss == 0.68
    one = {"epoch": 0.1, "seconds": 1.0, "tokens": 100, "pairs": 4}
    for step, loss in ((1, 0.6931), (2, 0.6)):
        tracker.step(step, **one, metrics={"train/preference_loss": loss}, at_start=0.7 * step)
        tracker.measured({"val/preference_loss": 0.1}, at_start=0.9)
    assert tracker.newest.first_preference_loss == 0.6931
    assert tracker.newest.expected_first_preference_loss == 0.7
    resumed = ProgressTracker(events)
    resumed.plan(step=4, total=10, last_checkpoint_step=4)
    resumed.step(5, **one, metrics={"train/preference_loss": 0.5}, at_start=0.7)
    assert resumed.newest.first_preference_loss is None
    assert resumed.newest.expected_first_preference_loss is None


def test_validation_slows_the_estimate_and_not_the_speed(tracker: ProgressTracker, clock: Clock) -> None:
    tracker.plan(step=0, total=10)
    take(tracker, clock, 1, seconds=2.0)
    tracker.phase("validate", done=0, of=5)
    clock.seconds += 4.0
    newest = take(tracker, clock, 2, seconds=2.0)
    assert newest.tokens_per_second == pytest.approx(50)
    assert newest.eta_seconds == pytest.approx(8 * 2.0 * (8 / 4)), "8 s went by for 4 s of steps"
    assert newest.done is None


def test_the_window_follows_a_change(tracker: ProgressTracker, clock: Clock) -> None:
    tracker.plan(step=0, total=100)
    for step in range(1, WINDOW_STEPS + 1):
        take(tracker, clock, step, seconds=1.0)
    for step in range(WINDOW_STEPS + 1, 2 * WINDOW_STEPS + 1):
        newest = take(tracker, clock, step, seconds=0.5)
    assert newest.tokens_per_second == pytest.approx(200)
    assert newest.eta_seconds == pytest.approx(0.5 * 60)


def test_a_resumed_attempt_measures_itself_only(tracker: ProgressTracker, clock: Clock) -> None:
    tracker.plan(step=50, total=60, last_checkpoint_step=50)
    clock.seconds += 500
    newest = take(tracker, clock, 51, seconds=2.0)
    assert newest.eta_seconds == pytest.approx(9 * 2.0)
    assert newest.last_checkpoint_step == 50


def test_events_are_phases_milestones_and_a_thinned_stream(
    tracker: ProgressTracker, clock: Clock, events: Path
) -> None:
    tracker.phase("index")
    for pairs in range(1, 1001):
        clock.seconds += QUIET_SECONDS / 10
        tracker.phase("index", done=pairs, of=1000)
    written = lines(events)
    assert written[0].done is None
    assert written[-1].done == 1000, "the last unit is always written"
    assert 85 <= len(written) <= 105
    tracker.plan(step=0, total=3)
    for step in (1, 2, 3):
        take(tracker, clock, step, seconds=QUIET_SECONDS / 100)
    assert lines(events)[-1].step == 3, "the last step is always written"
    tracker.measured({"val/acc": 0.5})
    tracker.saved(3)
    tracker.phase("done", message="model: /out")
    tail = lines(events)[-3:]
    assert tail[0].metrics == {"train/loss": 1 / 3, "val/acc": 0.5}
    assert tail[1].last_checkpoint_step == 3
    assert (tail[2].phase, tail[2].message, tail[2].eta_seconds) == ("done", "model: /out", None)


def test_status_is_never_thinned(clock: Clock) -> None:
    board = Board()
    tracker = ProgressTracker(None, board, clock=clock)
    for pairs in range(1, 6):
        tracker.phase("reference", done=pairs, of=10)
    assert [progress.done for progress in board.seen] == [1, 2, 3, 4, 5]


def test_nan_is_left_out_and_a_finished_run_says_so(tracker: ProgressTracker, clock: Clock, events: Path) -> None:
    tracker.plan(step=0, total=4)
    clock.seconds += 1
    tracker.step(1, epoch=0.1, seconds=0.0, tokens=1, pairs=1, metrics={"train/loss": float("nan"), "train/acc": 1.0})
    newest = tracker.newest
    assert newest.metrics == {"train/acc": 1.0}
    assert newest.tokens_per_second is None
    tracker.finished(4, {"val/acc": 0.9})
    last = lines(events)[-1]
    assert (last.phase, last.step, last.total, last.metrics) == ("done", 4, 4, {"val/acc": 0.9})


def test_warnings_are_one_line_and_stay_at_status(tracker: ProgressTracker, events: Path) -> None:
    tracker.phase("index")
    tracker.warn([])
    assert len(lines(events)) == 1
    tracker.warn(["few pairs", "no end"])
    tracker.phase("train")
    assert [line.warnings for line in lines(events)] == [(), ("few pairs", "no end"), ()]
    assert tracker.newest.warnings == ("few pairs", "no end")


def test_an_unknown_total_has_no_estimate(tracker: ProgressTracker, clock: Clock) -> None:
    assert take(tracker, clock, 1, seconds=1.0).eta_seconds is None


def test_a_file_that_cannot_be_written_is_one_warning(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = ProgressTracker(tmp_path / "absent" / "events", Board(), clock=clock)
    tracker.phase("index")
    tracker.phase("train")
    assert len(caplog.records) == 1
    assert tracker.newest.phase == "train"
