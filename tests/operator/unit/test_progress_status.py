"""Progress, columns and the run's invariants: from rank 0's answers to the status and events, and their rate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from dpo_api.crd import custom_resource_definition
from dpo_api.errors import Outcome
from dpo_api.progress import Best, Progress
from dpo_operator import clock, names
from dpo_operator.progress import INT_MAX, status_of, summarise
from dpo_operator.types import Scrape
from dpo_testing.crd_schema import problems
from dpo_testing.simcluster import START, SimCluster, manifest

FINE = {"train/loss": 0.69, "train/acc": 0.6, "train/rewards_margin": 0.1}


def running(**spec: Any) -> SimCluster:
    cluster = SimCluster(manifest(**spec))
    cluster.run_to("Running")
    return cluster


def test_progress_and_columns() -> None:
    cluster = running()
    metrics = {"train/loss": 0.4321, "train/acc": 0.7, "train/rewards_margin": 0.3}
    cluster.say(step=41, epoch=0.4321987, eta_seconds=11_530.7, tokens_per_second=12_345.678, metrics=metrics)
    cluster.settle()
    assert cluster.status["summary"] == {
        "step": "41/100",
        "accuracy": "0.70",
        "margin": "0.30",
        "loss": "0.4321",
        "eta": "3h12m",
    }
    assert cluster.status["progress"] == {
        "phase": "train",
        "step": 41,
        "total": 100,
        "epoch": 0.4322,
        "etaSeconds": 11_530,
        "tokensPerSecond": 12_345.7,
        "metrics": metrics,
        "observedAt": clock.to_text(START),
        "changedAt": clock.to_text(START),
    }
    assert cluster.status["message"] == "Training, step 41 of 100."
    assert cluster.attempts[0]["lastStep"] == 41


def test_the_best_validation_is_shown_and_outlasts_an_attempt() -> None:
    cluster = running()
    best = Best(metric="val/loss", step=20, value=0.5)
    cluster.say(step=31, best=best)
    cluster.settle()
    assert cluster.status["progress"]["best"] == {"metric": "val/loss", "step": 20, "value": 0.5}
    cluster.say(step=32)
    cluster.settle()
    assert cluster.status["progress"]["best"]["step"] == 20


def test_a_best_validation_that_no_trainer_says_is_bounded() -> None:
    said = Progress(phase="train", best=Best(metric="val/\nloss", step=INT_MAX + 1, value=1.0))
    best = status_of(said, START, None).best
    assert best is not None
    assert (best.metric, best.step) == ("val/ loss", INT_MAX)


def test_an_attempt_began_where_its_trainer_says() -> None:
    """The operator may have missed the last checkpoint of the attempt before: its trainer loaded it and knows."""
    cluster = running()
    assert cluster.attempts[0]["fromStep"] == 0
    cluster.say(step=31, from_step=30)
    cluster.settle()
    assert cluster.attempts[0]["fromStep"] == 30


def test_validation_comes_before_training_in_the_columns() -> None:
    cluster = running()
    cluster.say(step=50, metrics={**FINE, "val/acc": 0.81, "val/rewards_margin": 0.9})
    cluster.settle()
    assert cluster.status["summary"]["accuracy"] == "0.81"
    assert cluster.status["summary"]["margin"] == "0.90"


def test_the_layout_is_shown() -> None:
    cluster = running()
    cluster.say(step=1, layout="T2 P1 D4", metrics=FINE)
    cluster.settle()
    assert cluster.status["progress"]["layout"] == "T2 P1 D4"
    assert cluster.status["summary"]["layout"] == "T2 P1 D4"


def test_the_commits_of_inputs_on_the_hub_are_shown() -> None:
    cluster = running()
    cluster.say(step=1, revisions=["hf://org/model@" + "0" * 40], metrics=FINE)
    cluster.settle()
    assert cluster.status["progress"]["revisions"] == ["hf://org/model@" + "0" * 40]


def test_progress_alone_is_written_once_a_minute() -> None:
    cluster = running()
    cluster.say(step=1, metrics=FINE)
    cluster.settle()
    writes = cluster.calls.count("PatchStatus")
    for step in range(2, 62):
        cluster.advance(10)
        cluster.say(step=step, metrics=FINE)
        cluster.settle()
    assert cluster.calls.count("PatchStatus") - writes == 10


def test_what_matters_is_written_at_once() -> None:
    cluster = running()
    cluster.say(step=1, metrics=FINE)
    cluster.settle()
    assert cluster.condition("Finite") == ("True", "LossFinite")
    assert cluster.condition("ProgressAvailable") == ("True", "ScrapeSucceeded")
    cluster.advance(1)
    cluster.say(step=2, metrics={"train/acc": 0.6})
    cluster.settle()
    assert cluster.condition("Finite") == ("False", "LossNotFinite")


def test_a_failed_scrape_is_no_stall_and_no_restart() -> None:
    cluster = running(runPolicy={"stallTimeoutSeconds": 60})
    cluster.say(step=5, metrics=FINE)
    cluster.settle()
    seen = cluster.status["progress"]["observedAt"]
    calls = len(cluster.calls)
    for _ in range(100):
        cluster.advance(30)
        cluster.scrape = Scrape(at=cluster.now, child="job-1", error="connection refused")
        cluster.settle()
    assert cluster.condition("ProgressAvailable") == ("False", "ScrapeFailed")
    assert "connection refused" in next(
        c["message"] for c in cluster.status["conditions"] if c["type"] == "ProgressAvailable"
    )
    assert cluster.status["progress"]["observedAt"] == seen, "it ages, and says so"
    assert cluster.condition("TrainingStalled") == ("False", "StepsAdvance")
    assert cluster.state == "Running"
    assert cluster.created == ["job-1"]
    assert len(cluster.calls) - calls <= 2, "one condition, one event"


def test_silence_before_rank_zero_serves_is_no_news() -> None:
    cluster = running()
    cluster.scrape = Scrape(at=cluster.now, child="job-1", error="HTTP 503")
    cluster.settle()
    assert cluster.condition("ProgressAvailable") is None


def test_an_answer_about_another_attempt_is_ignored() -> None:
    cluster = running()
    said = Progress(phase="train", step=7, total=9, attempt=names.fence(int(START), 2))
    cluster.scrape = Scrape(at=cluster.now, child="job-1", progress=said)
    cluster.settle()
    assert "progress" not in cluster.status
    cluster.scrape = Scrape(at=cluster.now, child="job-9", progress=said.model_copy(update={"attempt": 1}))
    cluster.settle()
    assert "progress" not in cluster.status


def test_an_answer_of_another_job_is_ignored() -> None:
    """Its pod has the address that this job's rank 0 had, and its attempt has the same number."""
    cluster = running()
    fence = names.fence(int(START) - 500_000, 1)
    said = Progress(phase="train", step=9000, total=10_000, last_checkpoint_step=9000, attempt=fence)
    cluster.advance(3600)
    cluster.scrape = Scrape(at=cluster.now, child="job-1", progress=said)
    cluster.settle()
    assert "progress" not in cluster.status
    assert cluster.condition("ProgressAvailable") == ("False", "ScrapeFailed")
    cluster.advance(60)
    cluster.say(step=5)
    cluster.settle()
    assert cluster.status["progress"]["step"] == 5
    assert "lastCheckpointStep" not in cluster.status["progress"]


def test_what_a_trainer_says_is_not_trusted() -> None:
    hostile = Progress(
        phase="train",
        step=10**30,
        total=10**30,
        epoch=1e300,
        eta_seconds=1e300,
        tokens_per_second=1e300,
        message="x" * 1000 + "\x00\n",
        layout="T8\n" * 20,
        revisions=("hf://org/\n" + "x" * 1000,) * 100,
        metrics={**{f"m{i}": 1.0 for i in range(500)}, "a" * 5000: 1.0, "b\n": 1.0, "big": 1e308},
    )
    status = status_of(hostile, START, None)
    assert len(status.metrics) == 128
    assert all(len(name) <= 128 and name.isprintable() for name in status.metrics)
    text = json.dumps(status.model_dump(mode="json", by_alias=True), allow_nan=False)
    assert len(text) < 10_000
    assert status.revisions
    assert all(len(each) <= 256 and each.isprintable() for each in status.revisions)
    summary = summarise(status)
    assert all(len(value) <= 32 for name, value in summary.model_dump().items() if value and name != "layout")
    assert summary.layout is not None
    assert summary.layout.isprintable()
    assert len(summary.layout) <= 64


def test_a_failed_jobs_final_values_come_from_its_termination_message() -> None:
    """They are younger than the last answer to a scrape. What is left until the end is nobody's business any more."""
    cluster = running(runPolicy={"maxRestarts": 0})
    cluster.say(step=41, eta_seconds=900, metrics={"train/loss": 0.6, "train/acc": 0.6, "train/rewards_margin": 0.1})
    cluster.settle()
    assert cluster.status["summary"]["eta"] == "15m"
    last = {"step": 45, "total": 100, "metrics": {"train/loss": 0.5, "val/acc": 0.8}}
    cluster.end_pod("job-1-master-0", Outcome.Internal, **last)
    cluster.end_pod("job-1-worker-0", Outcome.Internal, step=44, total=100, metrics={"train/loss": 9.0})
    cluster.settle()
    assert cluster.state == "Failed"
    assert cluster.status["finalMetrics"] == {
        "train/loss": 0.5,
        "train/acc": 0.6,
        "train/rewards_margin": 0.1,
        "val/acc": 0.8,
    }
    assert cluster.status["summary"] == {"step": "45/100", "accuracy": "0.80", "loss": "0.5000"}


def test_a_job_that_does_not_run_has_no_time_left() -> None:
    cluster = running()
    cluster.say(step=41, eta_seconds=900, metrics=FINE)
    cluster.settle()
    assert cluster.status["summary"]["eta"] == "15m"
    cluster.edit(suspend=True)
    cluster.settle()
    cluster.stop_leaving(42)
    cluster.settle()
    assert cluster.state == "Suspended"
    assert "eta" not in cluster.status["summary"]


@pytest.mark.parametrize("outcome", [Outcome.Succeeded, Outcome.Stopped, Outcome.Internal], ids=lambda o: o.name)
def test_termination_messages_are_not_trusted_either(outcome: Outcome) -> None:
    """A status that the API server refuses would be written for ever, and the job never end."""
    schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    cluster = running(runPolicy={"maxRestarts": 0})
    cluster.say(step=1, metrics={f"m{i}": 1.0 for i in range(128)})
    cluster.settle()
    words = {"step": 10**30, "total": 10**30, "metrics": {f"n{i}": 1.0 for i in range(128)}}
    for role in ("worker", "master"):
        cluster.end_pod(f"job-1-{role}-0", outcome, **words)
    cluster.settle()
    status = cluster.status
    assert status["attempts"][0]["endTime"]
    assert status["attempts"][0]["lastStep"] == INT_MAX
    assert problems(schema, status) == []
    steps = [status["progress"][name] for name in ("step", "total", "lastCheckpointStep") if name in status["progress"]]
    assert max(steps) <= INT_MAX


@pytest.mark.parametrize("value", [1e300, -1e300, 1e-300, 123456789.123])
def test_columns_stay_narrow(value: float) -> None:
    said = Progress(phase="train", step=1, total=2, metrics={"train/loss": value, "train/acc": value})
    summary = summarise(status_of(said, START, None))
    assert summary.loss is not None
    assert len(summary.loss) <= 16


# -- the run's invariants


@pytest.mark.parametrize(
    ("dpo", "loss", "expected", "verdict"),
    [
        ({}, math.log(2), math.log(2), ("True", "PolicyEqualsReference")),
        ({}, math.log(2) * 1.01, math.log(2), ("True", "PolicyEqualsReference")),
        ({}, 0.65, math.log(2), ("False", "PolicyDiffersFromReference")),
        ({}, 0.75, math.log(2), ("False", "PolicyDiffersFromReference")),
        ({"loss": "ipo", "beta": 0.1}, 25.0, 25.0, ("True", "PolicyEqualsReference")),
        ({"loss": "ipo", "beta": 0.1}, 24.0, 25.0, ("False", "PolicyDiffersFromReference")),
        ({"loss": "ipo", "beta": 5}, 0.0103, 0.01, ("False", "PolicyDiffersFromReference")),
        ({"loss": "rpo_sq"}, 1.01, 1.0, ("True", "PolicyEqualsReference")),
        ({"loss": "rpo_sq"}, 0.9, 1.0, ("False", "PolicyDiffersFromReference")),
        ({"loss": "rpo_bwd_kl"}, 0.111, 0.1109, ("True", "PolicyEqualsReference")),
        ({"loss": "rpo_bwd_kl"}, 0.12, 0.1109, ("False", "PolicyDiffersFromReference")),
        ({"loss": "rpo_fwd_kl"}, 0.13, 0.1201, ("False", "PolicyDiffersFromReference")),
        ({"loss": "rpo_sq", "gtRewardScale": 0}, 0.0009, 0.0, ("True", "PolicyEqualsReference")),
        ({"loss": "rpo_sq", "gtRewardScale": 0}, 0.0011, 0.0, ("False", "PolicyDiffersFromReference")),
        ({}, 0.9, None, None),
        ({}, None, math.log(2), None),
    ],
)
def test_the_first_loss_is_that_of_equal_policy_and_reference(
    dpo: dict[str, Any], loss: float | None, expected: float | None, verdict: tuple[str, str] | None
) -> None:
    cluster = running(dpo=dpo)
    first = {"first_preference_loss": loss, "expected_first_preference_loss": expected}
    cluster.say(step=50, **first, metrics={**FINE, "train/preference_loss": 0.2})
    cluster.settle()
    assert cluster.condition("ReferenceConsistent") == verdict
    warned = "PolicyDiffersFromReference" in cluster.event_reasons()
    assert warned == (verdict is not None and verdict[0] == "False")


@pytest.mark.parametrize(("loss", "beta", "text"), [(5e-5, 100, "is 5e-5, but"), (2.51e-5, 100, "is 2.51e-5;")])
def test_small_first_losses_differ_in_the_message(loss: float, beta: float, text: str) -> None:
    """With ipo and a large beta both losses are below 0.0001."""
    cluster = running(dpo={"loss": "ipo", "beta": beta})
    cluster.say(step=50, first_preference_loss=loss, expected_first_preference_loss=2.5e-5, metrics=FINE)
    cluster.settle()
    message = next(c["message"] for c in cluster.status["conditions"] if c["type"] == "ReferenceConsistent")
    assert text in message
    assert "a policy equal to its reference gives 2.5e-5" in message


def test_the_first_loss_of_another_attempt_is_not_taken_for_this_ones() -> None:
    cluster = running()
    cluster.say(step=0)
    cluster.settle()
    first = {"first_preference_loss": 2.0, "expected_first_preference_loss": math.log(2)}
    cluster.say(step=50, **first, attempt=names.fence(int(START), 7))
    cluster.settle()
    assert cluster.condition("ReferenceConsistent") is None
    cluster.say(step=50, **first)
    cluster.settle()
    assert cluster.condition("ReferenceConsistent") == ("False", "PolicyDiffersFromReference")


def test_validation_before_the_first_step_is_compared_too_and_later_steps_are_not() -> None:
    cluster = running()
    first = {"first_preference_loss": math.log(2), "expected_first_preference_loss": math.log(2)}
    cluster.say(phase="validate", step=0, **first, metrics={"val/preference_loss": math.log(2)})
    cluster.settle()
    assert cluster.condition("ReferenceConsistent") == ("True", "PolicyEqualsReference")
    late = running()
    late.say(step=1, metrics={**FINE, "train/preference_loss": 0.5, "val/preference_loss": 0.5})
    late.settle()
    assert late.condition("ReferenceConsistent") is None


@pytest.mark.parametrize(
    ("step", "accuracy", "margin", "verdict"),
    [
        (1, 0.9, 1.0, ("True", "AboveChance")),
        (99, 0.5, 0.0, ("Unknown", "TooEarly")),
        (100, 0.55, 0.1, ("False", "AtChance")),
        (100, 0.56, 0.1, ("True", "AboveChance")),
        (100, 0.9, -0.1, ("False", "MarginNegative")),
        (100, 0.5, 0.0, ("False", "AtChance")),
    ],
)
def test_learning(step: int, accuracy: float, margin: float, verdict: tuple[str, str]) -> None:
    cluster = running()
    cluster.say(
        step=step, total=1000, metrics={"train/loss": 0.6, "train/acc": accuracy, "train/rewards_margin": margin}
    )
    cluster.settle()
    assert cluster.condition("Learning") == verdict


def test_learning_is_judged_by_training_until_there_is_a_validation() -> None:
    """The validation before step 1 brings losses alone: its rewards would be rounding."""
    cluster = running()
    first = {"val/loss": math.log(2), "val/preference_loss": math.log(2)}
    cluster.say(step=150, total=1000, metrics={**first, "train/loss": 0.4, "train/acc": 0.8, "train/rewards_margin": 1})
    cluster.settle()
    assert cluster.condition("Learning") == ("True", "AboveChance")
    assert (cluster.status["summary"]["accuracy"], cluster.status["summary"]["margin"]) == ("0.80", "1.00")
    cluster.advance(60)
    late = {**first, "val/acc": 0.5, "val/rewards_margin": 0.1}
    cluster.say(step=200, total=1000, metrics={**late, "train/loss": 0.4, "train/acc": 0.8, "train/rewards_margin": 1})
    cluster.settle()
    assert cluster.condition("Learning") == ("False", "AtChance")


def test_fine_tuning_alone_is_not_asked_for_accuracy() -> None:
    cluster = running(dpo={"preferenceWeight": 0, "sftWeight": 1})
    cluster.say(step=500, total=1000, metrics={"train/loss": 0.6, "train/acc": 0.0, "train/rewards_margin": 0.0})
    cluster.settle()
    assert cluster.condition("Learning") is None


def test_non_finite_ends_and_says_so() -> None:
    cluster = running()
    cluster.end_pod("job-1-master-0", Outcome.NonFinite, message="step 7: the loss is NaN")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.condition("Finite") == ("False", "LossNotFinite")
    assert cluster.condition("Failed") == ("True", "NonFinite")


def stand_still(cluster: SimCluster, seconds: int, **progress: Any) -> None:
    for _ in range(seconds // 30):
        cluster.advance(30)
        cluster.say(**progress)
        cluster.settle()


def test_a_stall_is_a_condition_and_with_a_limit_ends_the_attempt() -> None:
    cluster = running()
    cluster.say(step=5, metrics=FINE)
    cluster.settle()
    stand_still(cluster, 570, step=5, metrics=FINE)
    assert cluster.condition("TrainingStalled") == ("False", "StepsAdvance")
    stand_still(cluster, 90, step=5, metrics=FINE)
    assert cluster.condition("TrainingStalled") == ("True", "NoStep")
    assert cluster.state == "Running", "no stallTimeoutSeconds, no restart"
    cluster.advance(30)
    cluster.say(step=6, metrics=FINE)
    cluster.settle()
    assert cluster.condition("TrainingStalled") == ("False", "StepsAdvance")
    assert cluster.event_reasons().count("NoStep") == 1


def test_a_stall_is_retryable() -> None:
    cluster = running(runPolicy={"stallTimeoutSeconds": 120, "maxRestarts": 1})
    cluster.say(step=5, metrics=FINE)
    cluster.settle()
    stand_still(cluster, 180, step=5, metrics=FINE)
    assert cluster.attempts[0]["reason"] == "Stalled"
    assert cluster.deleted == ["job-1"]
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.status["chargedRestarts"] == 1
    cluster.sleep_out()
    cluster.run_to("Running")
    assert cluster.condition("TrainingStalled") is None, "that was the attempt before"
    cluster.advance(60)
    cluster.say(step=5, metrics=FINE)
    cluster.settle()
    assert cluster.state == "Running", "it goes on where the last one stood still"
    assert cluster.condition("TrainingStalled") == ("False", "StepsAdvance")
    stand_still(cluster, 180, step=5, metrics=FINE)
    assert cluster.attempts[1]["reason"] == "Stalled"


def stalled(**policy: Any) -> SimCluster:
    """Return a job whose trainer answers but does not advance, with the condition that says so."""
    cluster = running(runPolicy=policy)
    cluster.say(step=5, metrics=FINE)
    cluster.settle()
    stand_still(cluster, 660, step=5, metrics=FINE)
    assert cluster.condition("TrainingStalled") == ("True", "NoStep")
    assert cluster.condition("ProgressAvailable") == ("True", "ScrapeSucceeded")
    return cluster


def suspend(cluster: SimCluster) -> None:
    cluster.edit(suspend=True)


def fail(cluster: SimCluster) -> None:
    cluster.end_pod("job-1-worker-0", Outcome.InvalidData, message="line 7")


def succeed(cluster: SimCluster) -> None:
    cluster.end_pod("job-1-master-0", Outcome.Succeeded, step=100, total=100)


def exceed_the_deadline(cluster: SimCluster) -> None:
    cluster.edit(activeDeadlineSeconds=60)


def preempt(cluster: SimCluster) -> None:
    cluster.children["job-1"]["spec"]["runPolicy"]["suspend"] = True


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (suspend, "Suspended"),
        (fail, "Failed"),
        (succeed, "Succeeded"),
        (exceed_the_deadline, "Failed"),
        (preempt, "Queued"),
    ],
)
def test_a_job_without_nodes_has_no_conditions_about_stall_or_progress(
    end: Callable[[SimCluster], None], state: str
) -> None:
    cluster = stalled(queueName="team-a")
    end(cluster)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.state == state
    assert cluster.condition("TrainingStalled") is None
    assert cluster.condition("ProgressAvailable") is None
    assert cluster.event_reasons().count("NoStep") == 1


@pytest.mark.parametrize(
    ("verified", "expected"),
    [(True, ("True", "LayoutAgrees")), (False, ("False", "LayoutDiffers")), (None, ("Unknown", "LayoutNotCompared"))],
)
def test_what_the_comparison_of_the_layout_found(verified: bool | None, expected: tuple[str, str]) -> None:
    cluster = running()
    cluster.say(phase="index", step=0)
    cluster.settle()
    assert cluster.condition("LayoutVerified") is None, "nothing divides the model, or it is not loaded yet"
    cluster.say(phase="reference", step=0, done=1, of=9, layout_verified=verified, layout_verdict="verified: 1.2e-07")
    cluster.settle()
    assert cluster.condition("LayoutVerified") == expected
    assert message_of(cluster, "LayoutVerified") == "Layout verified: 1.2e-07."
    assert cluster.event_reasons().count("LayoutDiffers") == (verified is False)


def test_a_wrong_layout_ends_the_job_and_says_so() -> None:
    """The trainer ends before anybody asks it again: its termination message is what is left."""
    cluster = running()
    cluster.end_pod("job-1-master-0", Outcome.WrongLayout, message="log-probs differ by 1.0e-03")
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.condition("LayoutVerified") == ("False", "LayoutDiffers")
    assert "log-probs differ by 1.0e-03" in message_of(cluster, "LayoutVerified")
    assert cluster.condition("Failed") == ("True", "WrongLayout")
    assert cluster.created == ["job-1"]


def test_a_slow_rank_is_a_condition_until_it_is_slow_no_more() -> None:
    cluster = running()
    paced = {**FINE, "train/slowest_rank": 5.0, "train/slowest_rank_ratio": 1.1}
    cluster.say(step=3, metrics=FINE)
    cluster.settle()
    assert cluster.condition("SlowRank") is None, "one process, or nothing to compare yet"
    cluster.say(step=4, metrics=paced)
    cluster.settle()
    assert cluster.condition("SlowRank") == ("False", "RanksKeepPace")
    cluster.say(step=9, metrics=paced, slow_rank=5, slow_rank_ratio=1.84, slow_rank_host="job-1-worker-0")
    cluster.settle()
    text = "Rank 5 on job-1-worker-0 takes 1.8 times as long as the median for its own part of a step."
    assert cluster.condition("SlowRank") == ("True", "RankIsSlow")
    assert message_of(cluster, "SlowRank") == text
    cluster.advance(60)
    cluster.say(step=12, metrics=paced, slow_rank=5, slow_rank_ratio=2.5, slow_rank_host="job-1-worker-0")
    cluster.settle()
    assert message_of(cluster, "SlowRank") == text, "the same rank: not worth a write"
    cluster.advance(60)
    cluster.say(step=13, metrics=paced, slow_rank=55)
    cluster.settle()
    assert message_of(cluster, "SlowRank").startswith("Rank 55 takes many times as long")
    cluster.say(step=20, metrics=paced)
    cluster.settle()
    assert cluster.condition("SlowRank") == ("False", "RanksKeepPace")
    assert cluster.event_reasons().count("RankIsSlow") == 1
    suspend(cluster)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.condition("SlowRank") is None, "it was of pods that are gone"


def message_of(cluster: SimCluster, kind: str) -> str:
    return str(next(each["message"] for each in cluster.status["conditions"] if each["type"] == kind))


def test_a_stall_that_ends_the_job_stays_in_its_attempt() -> None:
    cluster = running(runPolicy={"stallTimeoutSeconds": 120, "maxRestarts": 0})
    cluster.say(step=5, metrics=FINE)
    cluster.settle()
    stand_still(cluster, 120, step=5, metrics=FINE)
    assert cluster.condition("TrainingStalled") == ("True", "NoStep"), "its pods still hold their nodes"
    cluster.kill_leaving()
    cluster.settle()
    assert cluster.condition("TrainingStalled") is None
    assert cluster.condition("Failed") == ("True", "RestartsExhausted")
    assert cluster.attempts[0]["reason"] == "Stalled"
    assert "no progress for 120 s in phase train, step 5" in cluster.attempts[0]["message"]
    assert [word for word in cluster.event_reasons() if word in ("NoStep", "Stalled")] == ["Stalled", "NoStep"]


def test_a_long_reference_pass_is_no_stall() -> None:
    cluster = running(runPolicy={"stallTimeoutSeconds": 60})
    for done in range(100):
        cluster.advance(45)
        cluster.say(phase="reference", step=0, total=0, done=done, of=1000)
        cluster.settle()
    assert cluster.state == "Running"
    assert cluster.status["message"].startswith("Computing reference log-probs: ")


@pytest.mark.parametrize(
    "progress",
    [
        {"phase": "starting", "message": "loading the model"},
        {"phase": "reference", "done": 1000, "of": 1000},  # then a checkpoint is loaded
        {"phase": "checkpoint", "step": 50},
        {"phase": "export", "step": 100},
    ],
    ids=lambda progress: str(progress["phase"]),
)
def test_a_phase_without_units_is_not_judged(progress: dict[str, Any]) -> None:
    cluster = running(runPolicy={"stallTimeoutSeconds": 600})
    cluster.say(step=progress.get("step", 0), metrics=FINE)
    cluster.settle()
    stand_still(cluster, 3600, **progress)
    assert cluster.state == "Running"
    assert cluster.created == ["job-1"]
    assert cluster.condition("TrainingStalled") != ("True", "NoStep")
    assert "NoStep" not in cluster.event_reasons()
    stand_still(cluster, 660, step=progress.get("step", 0), metrics=FINE)
    assert cluster.attempts[0]["reason"] == "Stalled", "the step that follows is judged again"


def test_a_stall_that_an_export_follows_is_over() -> None:
    cluster = stalled()
    stand_still(cluster, 60, phase="export", step=5)
    assert cluster.condition("TrainingStalled") == ("False", "StepsAdvance")
    stand_still(cluster, 3600, phase="export", step=5)
    assert cluster.condition("TrainingStalled") is None, "nobody can say whether it moves"


@pytest.mark.parametrize("progress", [{"phase": "index", "done": 7}, {"phase": "validate", "done": 0, "of": 3}])
def test_units_that_do_not_advance_are_a_stall(progress: dict[str, Any]) -> None:
    cluster = running(runPolicy={"stallTimeoutSeconds": 600})
    stand_still(cluster, 660, **progress)
    assert cluster.attempts[0]["reason"] == "Stalled"


def test_every_tenth_checkpoint_is_reported() -> None:
    cluster = running(checkpoint={"uri": "s3://runs/job/", "everySteps": 10})
    for step in range(0, 351, 10):
        cluster.advance(70)
        cluster.say(step=step, total=1000, metrics=FINE, last_checkpoint_step=step or None)
        cluster.settle()
    assert cluster.event_reasons().count("CheckpointSaved") == 3


def test_an_event_is_created_once_whatever_is_repeated() -> None:
    """Events go before the status that they tell of: a pass that is lost between the two tells them again, by name."""
    cluster = running()
    cluster.end_pod("job-1-worker-0", Outcome.InvalidData)
    snapshots = []
    for calls in range(12):
        try:
            cluster.controller()
            cluster.reconcile(budget=calls)
        except Exception:  # noqa: BLE001, S110 - the operator is killed at every call in turn
            pass
        snapshots.append(len(cluster.events))
    cluster.kill_leaving()
    cluster.settle()
    reasons = cluster.event_reasons()
    assert len(reasons) == len(set(reasons)), reasons
