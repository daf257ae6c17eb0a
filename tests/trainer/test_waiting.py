"""What a rank that has waited too long says of the others."""

import json
import time
from dataclasses import replace

import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dpo_api.errors import Outcome
from dpo_api.manifest import parse_job
from dpo_operator.backend.pytorchjob import Identity, build_child, spec_json
from dpo_operator.config import Settings
from dpo_testing.simcluster import manifest
from dpo_trainer.results import RankResult, summarise
from dpo_trainer.waiting import (
    STEP_WAIT_SECONDS,
    Beat,
    Place,
    Spot,
    Verdict,
    Watch,
    judge,
    stall_timeout,
    step_limit,
)

NOW = 5_000.0
REDUCTION = Spot("train", 41, "reduction of the gradients", 100, timed=True)
PASSES = replace(REDUCTION, part="forward and backward passes", number=99)
SAVING = Spot("checkpoint", 40, "barrier", 90)


def beats(**spots: Spot | None) -> tuple[dict[int, Beat], dict[int, Beat]]:
    """Two readings, 300 s apart, of ranks r0, r1, …; None: a rank that wrote only before the first one."""
    first, last = {}, {}
    for name, spot in spots.items():
        rank = int(name[1:])
        first[rank] = Beat(spot or PASSES, 10.0, NOW - 590)
        last[rank] = first[rank] if spot is None else Beat(spot, 600.0, NOW)
    return first, last


@pytest.mark.parametrize(
    ("spots", "size", "message", "patient"),
    [
        (
            {"r0": REDUCTION, "r1": PASSES},
            2,
            "rank 1 has not arrived (rank 1: forward and backward passes of step 41, 600 s)",
            False,
        ),
        (
            {"r0": REDUCTION, "r1": replace(PASSES, number=98), "r2": PASSES},
            3,
            "rank 1 has not arrived (rank 1: forward and backward passes of step 41, 600 s)",
            False,
        ),
        (
            {"r0": REDUCTION, "r1": None},
            2,
            "rank 1 has not arrived (rank 1: forward and backward passes of step 41, no word for 590 s)",
            False,
        ),
        (
            {"r0": REDUCTION, "r1": SAVING, "r2": REDUCTION},
            4,
            "ranks 1 and 3 have not arrived (rank 1: barrier of phase checkpoint, 600 s; rank 3: no word at all)",
            True,
        ),
        (
            {"r0": REDUCTION, "r1": REDUCTION},
            2,
            "all 2 ranks have arrived, so a GPU or the network between them does not answer",
            False,
        ),
        ({f"r{rank}": (REDUCTION, PASSES)[rank % 2] for rank in range(12)}, 12, "ranks 1, 3, 5, 7 and 2 more", False),
    ],
)  # fmt: skip
def test_the_message_names_the_missing_ranks_and_where_they_are(
    spots: dict[str, Spot | None], size: int, message: str, patient: bool
) -> None:
    found = judge(*beats(**spots), size, now=NOW)
    assert found.message.startswith("waited 600 s in the reduction of the gradients of step 41: ")
    assert message in found.message
    assert found.patient is patient


def test_no_word_of_anyone() -> None:
    assert judge({}, {}, 2, now=NOW) == Verdict("waited too long, and no rank gives word of itself", patient=False)


def test_ranks_count_their_places_alike() -> None:
    """Also if they index at unlike speeds, or have unlike numbers of packs."""
    fast, slow = Place(), Place()
    for place, reports in ((fast, 2), (slow, 9)):
        for _ in range(reports):
            place.enter("index")
        place.enter("train", step=1, timed=True)
        place.part("forward and backward passes")
        for _ in range(reports):
            place.touch()
        place.part("reduction of the gradients")
    assert fast.now[0] == slow.now[0] == Spot("train", 1, "reduction of the gradients", 3, timed=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"spot": {}}', '{"spot": {"number": "1"}, "age": 0, "at": 0}', "[" * 100_000,
             json.dumps({"spot": {"part": "x\n" * 9}, "age": 0, "at": 0})],
)  # fmt: skip
def test_what_no_rank_writes_is_no_beat(text: str) -> None:
    assert Beat.from_json(text.encode()) is None


def test_a_beat_is_read_as_it_was_written() -> None:
    beat = Beat(REDUCTION, 1.5, NOW)
    assert Beat.from_json(beat.to_json().encode()) == beat


def test_the_trainer_gives_up_before_the_operator_does() -> None:
    assert step_limit(None) == STEP_WAIT_SECONDS
    assert step_limit(600) == 450
    assert step_limit(10**6) == STEP_WAIT_SECONDS


@pytest.mark.parametrize("seconds", [600, None])
def test_a_pod_has_the_stall_timeout_that_its_pinned_spec_lacks(seconds: int | None) -> None:
    job = parse_job(manifest(runPolicy={} if seconds is None else {"stallTimeoutSeconds": seconds}))
    body = build_child(job, Identity("job", "team", "uid-1", created=1), 1, "trainer:1", Settings(), ())
    template = body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    variables = {entry["name"]: entry.get("value", "") for entry in template["containers"][0]["env"]}
    pinned = parse_job(json.loads(spec_json(job))).spec.run_policy
    assert stall_timeout(pinned, {}) is None
    assert stall_timeout(pinned, variables) == seconds
    assert stall_timeout(job.spec.run_policy, {}) == seconds  # `dpo run`, which pins nothing


@pytest.mark.slow
def test_a_rank_outside_of_steps_waits_on() -> None:
    """And one that lost contact learns what another one has found."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said: list[str] = []
    places = [Place(), Place()]
    store = PrefixStore("run", server)
    watches = [Watch(place, i, 2, store, limit=2.0, give_up=said.append) for i, place in enumerate(places)]
    places[0].enter("train", step=1, timed=True)
    for watch in watches:
        watch.start()
    time.sleep(4)  # rank 1 loads for longer than the limit of a step
    assert said == []
    assert watches[1].verdict() is None
    places[1].enter("train", step=1, timed=True)
    places[0].part("reduction of the gradients")
    for _ in range(600):
        if said:
            break
        time.sleep(0.05)
    assert "in the reduction of the gradients of step 1: rank 1 has not arrived (rank 1: start of step 1" in said[0]
    assert watches[1].verdict() == said[0]
    for watch in watches:
        watch.stop()


def test_the_node_reports_the_names_and_not_a_guess() -> None:
    """Not that a process was killed for lack of memory, although rank 1 left no result."""
    lost = RankResult(0, Outcome.Communication.name, "lost contact with another process", at=1.0)
    names = RankResult(2, Outcome.Communication.name, "waited 600 s", at=2.0, explains=True)
    words = summarise([lost, names], 1, asked=False)
    assert (words.outcome, words.message) == ("Communication", "waited 600 s")
    assert "killed, perhaps for lack of memory" in summarise([lost], 1, asked=False).message
