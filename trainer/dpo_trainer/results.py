"""What each rank reports when it ends, and how a node's reports become one termination message.

Each rank writes ``rank-<n>.json`` into a folder that the launcher made, and the launcher reads them at the end.
Imports neither torch nor Megatron-Core: the launcher uses it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_api.errors import Outcome
from dpo_api.progress import Best, LastWords

CAUSED_BY_PEERS = frozenset({Outcome.Communication.name, Outcome.Stopped.name})
"""Outcomes that one rank's failure causes in the others. They explain a run only if no rank reports another one."""


@dataclass(frozen=True)
class RankResult:
    """How one rank ended."""

    rank: int
    outcome: str
    message: str = ""
    at: float = 0.0
    """Unix time in seconds."""
    step: int = 0
    total: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    run_dir: str | None = None
    model_uri: str | None = None
    hub_uri: str | None = None
    attempt: int = 1
    last_checkpoint_step: int | None = None
    already_complete: bool = False
    best: dict[str, Any] | None = None
    model_step: int | None = None
    stopped_early: str = ""
    explains: bool = False
    """Whether the message says what happened to another rank, with which contact was lost."""

    @staticmethod
    def path(folder: Path, rank: int | str) -> Path:
        """The file in ``folder`` that holds this rank's result."""
        return folder / f"rank-{rank}.json"

    def write(self, folder: Path) -> None:
        """Write the result into ``folder``. The file is complete or absent, never partial."""
        path = self.path(folder, self.rank)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.rename(path)


def read_results(folder: Path) -> list[RankResult]:
    """Read the results that this node's ranks wrote, in order of rank."""
    return sorted(
        (RankResult(**json.loads(path.read_text())) for path in folder.glob(RankResult.path(folder, "*").name)),
        key=lambda result: result.rank,
    )


def summarise(results: Sequence[RankResult], agent_code: int, *, asked: bool) -> LastWords:
    """Sum up a node's results: the earliest failure that no other rank caused explains the run.

    agent_code: torchrun's exit code. asked: whether the run was asked to stop (SIGTERM or SIGINT).
    """
    if not results:
        if asked:
            return LastWords(outcome=Outcome.Stopped.name, message="stopped before training began")
        return LastWords(
            outcome=Outcome.Internal.name,
            message=f"the processes exited (code {agent_code}) without reporting a result; if the log does not say "
            "why, they were killed, perhaps for lack of memory",
        )
    failures = [result for result in results if result.outcome != Outcome.Succeeded.name]
    causes = [result for result in failures if result.outcome not in CAUSED_BY_PEERS]
    lost = (
        not causes and agent_code != 0 and not asked and all(r.outcome == Outcome.Communication.name for r in failures)
    )
    stopped = [result for result in failures if result.outcome == Outcome.Stopped.name]
    naming = [result for result in failures if result.explains]
    chosen = min(causes or stopped or naming or failures or results, key=lambda result: (result.at, result.rank))
    outcome, message = chosen.outcome, chosen.message
    if asked and outcome == Outcome.Communication.name:
        outcome = Outcome.Stopped.name
        message = (
            f"asked to stop, but a process exited before it could save; the last saved checkpoint is older ({message})"
        )
    if lost and failures and not naming:
        message = (
            f"a process of this run exited without reporting a result: killed, perhaps for lack of memory ({message})"
        )
    saved = [result.last_checkpoint_step for result in results if result.last_checkpoint_step is not None]
    return LastWords(
        outcome=outcome,
        message=message,
        step=chosen.step,
        total=chosen.total,
        metrics=chosen.metrics,
        run_dir=chosen.run_dir,
        model_uri=chosen.model_uri,
        hub_uri=next((result.hub_uri for result in results if result.hub_uri is not None), None),  # rank 0 alone pushes
        attempt=chosen.attempt,
        # The maximum, since a rank that lost its peers may know an older checkpoint only.
        last_checkpoint_step=max(saved, default=None),
        already_complete=chosen.already_complete,
        best=None if chosen.best is None else Best.model_validate(chosen.best),
        model_step=chosen.model_step,
        stopped_early=chosen.stopped_early,
    )
