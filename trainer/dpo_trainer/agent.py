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
from dpo_trainer.launch import RankResult, follow_parent

PEER_SECONDS = 5.0
"""How long a process may live on once another one of its node has failed: time to notice, and to say so."""

ENDING_SECONDS = 90.0
"""How long a process may take to close its outlets, once it has left its result."""

REAP_SECONDS = 30.0
"""How long to wait for a killed process: one that hangs in the kernel may never go."""

_GOOD_ENDS = (0, Outcome.Stopped.exit_code)


@dataclass(frozen=True)
class Worker:
    """One process of this node."""

    process: subprocess.Popen[Any]
    result: Path  #: written as soon as it knows how it ends
    close: Callable[[signal.Signals], None]

    @property
    def running(self) -> bool:
        """Whether it still lives."""
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        """Whether it has ended otherwise than by agreement of all: then its peers wait for it in vain."""
        return self.process.poll() not in (None, *_GOOD_ENDS)


def end(
    workers: Sequence[Worker],
    asked: signal.Signals,
    grace: float,
    *,
    peer: float = PEER_SECONDS,
    ending: float = ENDING_SECONDS,
) -> None:
    """Ask all processes to end, wait, and kill each that has used up its time (all times in seconds).

    grace: for a checkpoint. peer: instead of it, counted from the first failure of a process. ending: at least this
    much for one that has left its result.
    """
    for worker in workers:
        if worker.running:
            worker.close(asked)
    began = time.monotonic()
    failed: float | None = None
    killed: dict[Path, float] = {}
    while running := [worker for worker in workers if worker.running]:
        now = time.monotonic()
        if failed is None and any(worker.failed for worker in workers):
            failed = now
        for worker in running:
            last = began + grace if failed is None else min(began + grace, failed + peer)
            if worker.result.exists():
                last = began + max(grace, ending)
            if now >= last and worker.result not in killed:
                worker.close(signal.SIGKILL)
                killed[worker.result] = now
        if all(now - killed.get(worker.result, now) > REAP_SECONDS for worker in running):
            return
        time.sleep(0.05)


def agent(argv: Sequence[str]) -> int:
    """torchrun with these arguments; 1 when a process failed, 143 when it was asked to stop."""
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    follow_parent()
    results = Path(argv[argv.index("--results") + 1])

    def close(context: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        workers = [
            Worker(handler.proc, results / f"rank-{context.envs[place]['RANK']}.json", handler.close)
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
