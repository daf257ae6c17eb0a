"""Runs a function on several processes of this machine that share a gloo group."""

import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_testing.preloaded import PreloadedPopen, usable

_SECONDS = 300


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in ``ranks`` processes of their own inside one gloo group.

    function: of an importable module, and not of a test: the processes get it and its arguments by pickle.
    Raises RuntimeError with the traceback of the first rank that failed; the others are ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((ranks, function, arguments)))
        popen = PreloadedPopen if usable() else subprocess.Popen
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        children = [
            popen([sys.executable, "-m", "dpo_testing.gloo", name, str(rank)], env=environment) for rank in range(ranks)
        ]
        try:
            _wait(children)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        for rank in range(ranks):
            if (error := folder / f"error-{rank}").exists():
                raise RuntimeError(f"rank {rank}: {error.read_text()}")
        codes = [child.returncode for child in children]
        if any(codes):
            raise RuntimeError(f"exit codes of the ranks: {codes}")


def _wait(children: list[subprocess.Popen[Any]]) -> None:
    deadline = time.monotonic() + _SECONDS
    while any(child.poll() is None for child in children):
        if any(child.returncode for child in children):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks still ran after {_SECONDS} s")
        time.sleep(0.05)


def _main(folder: Path, rank: int) -> int:
    import torch
    import torch.distributed as dist

    try:
        ranks, function, arguments = pickle.loads((folder / "call").read_bytes())  # noqa: S301 - of run_ranks above
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
        function(rank, *arguments)
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the test's process raises it
        partial = folder / f".error-{rank}"
        partial.write_text(traceback.format_exc())
        partial.rename(folder / f"error-{rank}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), int(sys.argv[2])))
