"""Runs torchrun as a child of the launcher, without its tracebacks, and ends a node's processes in another way.

torchrun gives every process the same time: 30 s after one has failed, or the time of a checkpoint after a request to
stop. But a process whose peer has failed waits in a collective that never returns, cannot handle signals and can save
nothing. A process that is about to exit may need a minute to upload its metrics.
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
from dpo_trainer.failures import of_signal
from dpo_trainer.parent import follow_parent
from dpo_trainer.results import RankResult

PEER_SECONDS = 5.0
"""How long a process may run after another one of its node has failed: time to notice and to report it."""

ENDING_SECONDS = 90.0
"""How long a process may take to close its metrics writers after it has written its result."""

REAP_SECONDS = 30.0
"""How long to wait for a killed process: one that hangs in the kernel may never exit."""

STACKS_SECONDS = 1.0
"""How long a process that is about to be killed may print the stacks of its threads."""

LOCAL_RENDEZVOUS = "local"
"""Name by which torchrun knows dpo_trainer.rendezvous.LocalRendezvous."""

_GOOD_ENDS = (0, Outcome.Stopped.exit_code)


@dataclass(frozen=True)
class Worker:
    """One process of this node."""

    process: subprocess.Popen[Any]
    result: Path  #: written as soon as it knows how it ends
    close: Callable[[signal.Signals], None]

    @property
    def code(self) -> int | None:
        """Its exit code, -N for signal N; None while it runs.

        This asks the kernel too. torchrun's signal handler raises at any point of the program. If that is inside
        ``poll``, a lock stays held, and every later ``poll`` reports that the process runs.
        """
        found = self.process.poll()
        if found is not None:
            return found
        try:
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # another caller has waited for it: `poll` returns 0 then, too
            return 0
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self.code is None

    @property
    def failed(self) -> bool:
        """Whether it exited with a failure, so that its peers wait for it for ever."""
        return self.code not in (None, *_GOOD_ENDS)


def _kill(workers: Sequence[Worker], puzzling: Sequence[Worker]) -> None:
    """Kill all ``workers``; those in ``puzzling`` print their stacks first (see ``dpo_trainer.__main__``)."""
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
    """Ask all processes to exit, wait, and kill each one whose time is up. All times are in seconds.

    grace: time for a checkpoint. peer: replaces grace, counted from the first failure of a process. ending: replaces
    both for a process that has written its result, counted from when the result is first seen; it has nothing left to
    save. A process that uses up its grace or ending time prints its stacks before it is killed, to show why it hangs.
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


def report_signal(results: Path, rank: int, number: int) -> None:
    """Write the result of a process that a signal ended, unless it did so itself or the signal says nothing."""
    found = of_signal(number, gpu=Path("/dev/nvidiactl").exists())
    if found is not None and not RankResult.path(results, rank).exists():
        outcome, said = found
        message = f"rank {rank} {said}"
        RankResult(rank, outcome.name, message, at=time.time(), explains=True).write(results)


def agent(argv: Sequence[str]) -> int:
    """Run torchrun with these arguments; returns 1 if a process failed, 143 if it was asked to stop."""
    follow_parent()  # before the imports, which take seconds
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.run import main as torchrun

    from dpo_trainer.rendezvous import LocalRendezvous

    rendezvous_handler_registry.register(LOCAL_RENDEZVOUS, LocalRendezvous)

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
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            report_signal(results, rank, -failure.exitcode)
        return 1
    except SignalException:
        return Outcome.Stopped.exit_code
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("PET_MASTER_PORT", "of the rendezvous")
        message = (
            f"cannot listen on port {port} (PET_MASTER_PORT), the rendezvous port: another process on this machine "
            "uses it; stop that process or choose another port"
        )
        RankResult(rank=0, outcome=Outcome.PortInUse.name, message=message, at=time.time()).write(results)
        return Outcome.PortInUse.exit_code
    return 0
