"""Who waits for whom: each rank writes down where it is, and a wait that is too long names the ranks that are missing.

All ranks go through the same places in the same order, so that one with a smaller count has not arrived where another
one waits. A thread of each process writes its place to the rendezvous store a few times per limit. A process that is
stopped, or cut off, writes nothing: that is seen, too.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Self

from torch._C._distributed_c10d import Store

from dpo_api.running import RunPolicy

LONGEST_WAIT_SECONDS = 6 * 3600
"""How long a rank waits for the others where no limit is known.

Rank 0 may be writing a model of hundreds of gigabytes, or reading one.
"""

STEP_WAIT_SECONDS = 1800
"""How long a rank waits for the others in a step, a validation batch or a part of the reference pass, by default.

This is Megatron-Core's own time-out. It must exceed the longest step, since the host waits while its GPU computes, and
the first step, in which NCCL connects and kernels are built.
"""

_SHARE_OF_STALL = 0.75
"""The operator ends an attempt after stallTimeoutSeconds and cannot say why: the trainer, which can, must be first."""

_LONGEST_BEAT = 10.0
_STORE_SECONDS = 10.0
_VERDICT = "dpo/waiting/verdict"
_NAMED = 4
"""Most ranks of a kind that a message names."""


def stall_timeout(policy: RunPolicy, environment: Mapping[str, str]) -> int | None:
    """Return ``stallTimeoutSeconds``. In a pod it is a variable: its spec has no ``runPolicy``, which may change."""
    given = environment.get("DPO_STALL_TIMEOUT_SECONDS", "")
    return int(given) if given.isdecimal() else policy.stall_timeout_seconds


def step_limit(stall_timeout: int | None) -> float:
    """Return the seconds that a rank may wait in a step. stall_timeout: ``runPolicy.stallTimeoutSeconds``."""
    return STEP_WAIT_SECONDS if stall_timeout is None else min(STEP_WAIT_SECONDS, _SHARE_OF_STALL * stall_timeout)


@dataclass(frozen=True)
class Spot:
    """A place in the run."""

    phase: str = "starting"
    step: int = 0
    part: str = ""
    number: int = 0
    """Places before this one; comparable between ranks."""
    timed: bool = False
    """Whether the limit of steps holds here. Loading, checkpoints and exports take as long as they take."""

    def __str__(self) -> str:
        """Return the words for a message."""
        if self.phase == "train":
            return f"{self.part or 'start'} of step {self.step}"
        return f"{self.part} of phase {self.phase}" if self.part else f"phase {self.phase}"


class Place:
    """Where this process is. Entering a place costs one small object: no call of the system, no message."""

    def __init__(self) -> None:
        self.now: tuple[Spot, float] = (Spot(), time.monotonic())  #: and since when; replaced as one, for the thread

    def enter(self, phase: str, *, step: int | None = None, timed: bool = False) -> None:
        """Enter a phase, a step or a unit of a phase. All ranks must, except in the phase "index"."""
        spot = self.now[0]
        number = spot.number + (phase != "index")  # each rank reports its own progress in that one
        self._at(Spot(phase=phase, step=spot.step if step is None else step, number=number, timed=timed))

    def part(self, name: str) -> None:
        """Enter a part of the present step or phase. All ranks must."""
        spot = self.now[0]
        self._at(replace(spot, part=name, number=spot.number + 1))

    def touch(self) -> None:
        """Say that work goes on in this place, as with the next pack. Ranks may do so unequally often."""
        self._at(self.now[0])

    def _at(self, spot: Spot) -> None:
        self.now = (spot, time.monotonic())


@dataclass(frozen=True)
class Beat:
    """What a rank wrote last."""

    spot: Spot
    age: float
    """Seconds in this place, when it was written."""
    at: float
    """Unix time in seconds, by the clock of its node."""

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Self | None:
        """Return None for what no rank writes: the store has no authentication."""
        try:
            fields = json.loads(text)
            spot = Spot(**fields["spot"])
            beat = cls(spot=spot, age=float(fields["age"]), at=float(fields["at"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        known = isinstance(spot.number, int) and isinstance(spot.step, int) and isinstance(spot.timed, bool)
        texts = [text for text in (spot.phase, spot.part) if isinstance(text, str) and len(text) < 100]
        return beat if known and len(texts) == 2 and "".join(texts).isprintable() else None


@dataclass(frozen=True)
class Verdict:
    """What two readings of all ranks' beats say."""

    message: str
    patient: bool
    """Whether a missing rank is at work where no limit of steps holds, so that the wait goes on."""


def judge(first: Mapping[int, Beat], last: Mapping[int, Beat], size: int, *, now: float) -> Verdict:
    """Return who is missing. The readings must be so far apart that every live rank has written in between.

    now: Unix time in seconds.
    """
    silent = [rank for rank in range(size) if rank not in last or last[rank] == first.get(rank)]
    alive = {rank: beat for rank, beat in last.items() if rank not in silent}
    if not alive:
        return Verdict("waited too long, and no rank gives word of itself", patient=False)
    front = max(alive.values(), key=lambda beat: (beat.spot.number, beat.age))
    behind = [rank for rank, beat in sorted(alive.items()) if beat.spot.number < front.spot.number]
    waited = f"waited {front.age:.0f} s in the {front.spot}"
    # Those farther behind may hold up the others that are behind, in a smaller group.
    last_of_all = min((last[rank].spot.number for rank in {*silent, *behind} if rank in last), default=0)
    missing = sorted({*silent, *(rank for rank in behind if alive[rank].spot.number == last_of_all)})

    def said(rank: int) -> str:
        beat = last.get(rank)
        if beat is None:
            return f"rank {rank}: no word at all"
        since = f"no word for {max(0.0, now - beat.at):.0f} s" if rank in silent else f"{beat.age:.0f} s"
        return f"rank {rank}: {beat.spot}, {since}"

    if not missing:
        return Verdict(
            f"{waited}: all {size} ranks have arrived, so a GPU or the network between them does not answer",
            patient=False,
        )
    has = "have" if len(missing) > 1 else "has"
    return Verdict(
        f"{waited}: {_ranks(missing)} {has} not arrived ({'; '.join(said(rank) for rank in missing[:_NAMED])})",
        patient=any(not alive[rank].spot.timed for rank in behind),
    )


def _ranks(ranks: Sequence[int]) -> str:
    named = [str(rank) for rank in ranks[:_NAMED]]
    if len(ranks) > _NAMED:
        return f"ranks {', '.join(named)} and {len(ranks) - _NAMED} more"
    return f"rank {named[0]}" if len(named) == 1 else f"ranks {', '.join(named[:-1])} and {named[-1]}"


class Watch:
    """Two threads: one talks to the store and judges; the other one notices that the store does not answer."""

    def __init__(
        self, place: Place, rank: int, size: int, store: Store, *, limit: float, give_up: Callable[[str], None]
    ) -> None:
        """``store``: the rendezvous store. ``limit``: seconds in a step. ``give_up`` gets the message and ends all."""
        self._place, self._rank, self._size, self._limit, self._give_up = place, rank, size, limit, give_up
        # A client of its own: the main thread may wait for a key on the first one, which blocks other threads.
        self._store: Store = store.clone()  # type: ignore[attr-defined] # not in its stubs
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._beat_seconds = min(_LONGEST_BEAT, limit / 20)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._talk, self._look)]
        self._heard = time.monotonic()  #: when the store answered last

    def start(self) -> None:
        """Write the first beat, so that no rank is unknown, and start the threads."""
        self._write()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop judging: what follows takes as long as it takes."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(1.0)  # not for ever: the store may not answer

    def verdict(self) -> str | None:
        """Return the message of another rank that gave up, or None. For a rank that has lost contact with it."""
        found: list[str] = []

        def read() -> None:
            if self._store.check([_VERDICT]):
                text = self._store.get(_VERDICT).decode(errors="replace")
                if len(text) < 2000 and text.isprintable():
                    found.append(text)

        reader = threading.Thread(target=_quietly, args=(read,), daemon=True)
        reader.start()
        reader.join(_STORE_SECONDS / 2)
        return found[0] if found else None

    def _limit_here(self) -> float:
        # Five minutes before the collective's own time-out, which could not say who is missing.
        return self._limit if self._place.now[0].timed else LONGEST_WAIT_SECONDS - 300

    def _key(self, rank: int) -> str:
        return f"dpo/waiting/{rank}"

    def _write(self) -> None:
        spot, since = self._place.now
        self._store.set(self._key(self._rank), Beat(spot, time.monotonic() - since, time.time()).to_json())
        if self._store.check([self._key(self._rank)]):  # to set a key needs no answer
            self._heard = time.monotonic()

    def _read(self) -> dict[int, Beat]:
        found = {}
        for rank in range(self._size):
            if self._store.check([self._key(rank)]):
                beat = Beat.from_json(self._store.get(self._key(rank)))
                if beat is not None:
                    found[rank] = beat
        return found

    def _talk(self) -> None:
        first: dict[int, Beat] | None = None
        place = self._place.now
        while not self._stopped.wait(self._beat_seconds):
            _quietly(self._write)
            if self._place.now is not place:
                first, place = None, self._place.now
                continue
            age, limit = time.monotonic() - place[1], self._limit_here()
            if first is None and age >= limit / 2:
                first = _quietly(self._read)
            elif first is not None and age >= limit:
                last = _quietly(self._read)
                if last is not None:
                    found = judge(first, last, self._size, now=time.time())
                    if not found.patient and self._place.now is place and not self._stopped.is_set():
                        _quietly(partial(self._store.set, _VERDICT, found.message))
                        self._stopped.set()
                        self._give_up(found.message)

    def _look(self) -> None:
        late = 3 * self._beat_seconds + _STORE_SECONDS
        while not self._stopped.wait(self._beat_seconds):
            place, now = self._place.now, time.monotonic()
            age = now - place[1]
            if age >= self._limit_here() and now - self._heard > late and self._place.now is place:
                self._stopped.set()
                self._give_up(
                    f"waited {age:.0f} s in the {place[0]}: the rendezvous store does not answer, so the node of rank 0"
                    " or the network to it is lost"
                )


def _quietly[T](action: Callable[[], T]) -> T | None:
    """Return what ``action`` returns; None if the store does not answer."""
    try:
        return action()
    except RuntimeError:  # of which torch's DistError and its kinds are
        return None
