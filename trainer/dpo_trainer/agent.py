"""torchrun as the launcher's child, without its tracebacks, and with another way to end a node's processes.

torchrun gives all of them the same time, whatever each is doing: 30 s once one has failed, the time of a checkpoint
once the run was asked to stop. But a process whose peer has failed waits in a collective that never comes back, deaf to
signals, and can save nothing; and one that is on its way out may need a minute to hand in its metrics.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_api.errors import Outcome
from dpo_trainer.parent import follow_parent
from dpo_trainer.results import RankResult

PEER_SECONDS = 5.0
"""How long a process may live on once another one of its node has failed: time to notice, and to say so."""

ENDING_SECONDS = 90.0
"""How long a process may take to close its outlets, once it has left its result."""

REAP_SECONDS = 30.0
"""How long to wait for a killed process: one that hangs in the kernel may never go."""

STACKS_SECONDS = 1.0
"""How long a process that is about to be killed may print the stacks of its threads."""

_GOOD_ENDS = (0, Outcome.Stopped.exit_code)


@dataclass(frozen=True)
class Worker:
    """One process of this node."""

    process: subprocess.Popen[Any]
    result: Path  #: written as soon as it knows how it ends
    close: Callable[[signal.Signals], None]

    @property
    def code(self) -> int | None:
        """Its exit code, -N for signal N; None while it lives.

        The kernel is asked too: torchrun's signal handler raises wherever its process stands, and what it cuts short
        inside ``poll`` leaves a lock taken, with which every later ``poll`` says that the process lives.
        """
        found = self.process.poll()
        if found is not None:
            return found
        try:
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody else has waited for it: `poll` calls that 0, too
            return 0
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    @property
    def running(self) -> bool:
        """Whether it still lives."""
        return self.code is None

    @property
    def failed(self) -> bool:
        """Whether it has ended otherwise than by agreement of all: then its peers wait for it in vain."""
        return self.code not in (None, *_GOOD_ENDS)


def _kill(workers: Sequence[Worker], puzzling: Sequence[Worker]) -> None:
    """Kill them all, having let the puzzling ones print their stacks (see ``dpo_trainer.__main__``)."""
    for worker in puzzling:
        worker.close(signal.SIGUSR1)
    if puzzling:
        time.sleep(STACKS_SECONDS)
    for worker in workers:
        worker.close(signal.SIGKILL)


def end(
    workers: Sequence[Worker],
    asked: signal.Signals,
    grace: float,
    *,
    peer: float = PEER_SECONDS,
    ending: float = ENDING_SECONDS,
) -> None:
    """Ask all processes to end, wait, and kill each that has used up its time (all times in seconds).

    grace: for a checkpoint. peer: instead of it, counted from the first failure of a process. ending: instead of both
    for one that has left its result, counted from when that is first seen: all that it had to save is saved. One that
    uses up its grace or its ending is asked for its stacks first, since nobody knows what it waits for.
    """
    for worker in workers:
        if worker.running:
            worker.close(asked)
    began = time.monotonic()
    failed: float | None = None
    left: dict[Path, float] = {}
    killed: dict[Path, float] = {}
    while running := [worker for worker in workers if worker.running]:
        now = time.monotonic()
        if failed is None and any(worker.failed for worker in workers):
            failed = now
        late = []
        for worker in running:
            last = began + grace if failed is None else min(began + grace, failed + peer)
            if worker.result.exists():
                last = left.setdefault(worker.result, now) + ending
            if now >= last and worker.result not in killed:
                late.append(worker)
        _kill(late, puzzling=[worker for worker in late if failed is None or worker.result in left])
        killed.update({worker.result: now for worker in late})
        if all(now - killed.get(worker.result, now) > REAP_SECONDS for worker in running):
            return
        time.sleep(0.05)


def agent(argv: Sequence[str]) -> int:
    """torchrun with these arguments; 1 when a process failed, 143 when it was asked to stop."""
    follow_parent()  # before the imports, which take seconds
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    results = Path(argv[argv.index("--results") + 1])

    def close(context: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        workers = [
            Worker(handler.proc, RankResult.path(results, context.envs[place]["RANK"]), handler.close)
            for place, handler in context.subprocess_handlers.items()
        ]
        end(workers, death_sig, timeout)

    SubprocessContext._close = close  # type: ignore[assignment]
    try:
        torchrun(list(argv))
    except ChildFailedError:
        return 1
    except SignalException:
        return Outcome.Stopped.exit_code
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("PET_MASTER_PORT", "of the rendezvous")
        message = (
            f"cannot listen on port {port} (PET_MASTER_PORT), where the run's nodes meet: another process of this "
            "machine has it; end that process, or choose another port"
        )
        RankResult(rank=0, outcome=Outcome.PortInUse.name, message=message, at=time.time()).write(results)
        return Outcome.PortInUse.exit_code
    return 0
