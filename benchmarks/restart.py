"""Seconds until the first step of a run that was killed and is started again, against its first start and a plain loop.

    python benchmarks/restart.py [--rounds 2]

The model (32 million parameters) and the dialogue workload are those of against_trl.py. A first start also reads the
data and computes the reference; the run is killed after its second step, of which there is a checkpoint, and the same
command starts again. The peer is a script with transformers that loads its own checkpoint (weights and AdamW's state,
by torch.load) and takes a step over as many padded pairs; it has no data set to find its place in. Each is the time
from the start of the process to the end of its first step, the least of all rounds. The last line is JSON.
"""

# ruff: noqa: E402 - the test support lies where only pytest finds it by itself
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / package) for package in ("crds", "operator", "trainer", "tests/support")]

from against_trl import PEERS, Bench

from dpo_testing.runs import Finished, kill, start, wait_for_step
from dpo_trainer.rundir import MARKER

KILLED_AFTER = 2


def until_step(bench: Bench, round_: int, *, again: bool) -> float:
    """Start the run, wait for its first step (the first after the checkpoint), kill it; seconds that this took."""
    out = bench.folder / f"round {round_}"
    spec = bench.spec("dialogue", lora=False)
    spec |= {"reference": {"cacheURI": str(out / "reference")}, "checkpoint": {"everySteps": KILLED_AFTER}}
    began = time.monotonic()
    environment = {"DPO_CACHE_DIR": str(out / "cache"), "OMP_NUM_THREADS": str(os.cpu_count())}
    child = start(spec, out / "run", processes=1, scratch=out, environment=environment, preloaded=False)
    try:
        wait_for_step(out / "run", KILLED_AFTER + 1 if again else 1)
        seconds = time.monotonic() - began
        if not again:
            # The checkpoint is complete before the next step begins.
            wait_for_step(out / "run", KILLED_AFTER)
            while not (out / "run" / "checkpoints" / f"step-{KILLED_AFTER:06d}" / MARKER).exists():
                time.sleep(0.02)
    finally:
        kill(child)
    return seconds


def of_peer(bench: Bench, action: str) -> float:
    """Seconds of one start of the peer, as a whole."""
    began = time.monotonic()
    words = [sys.executable, str(PEERS / "plain_restart.py"), action, str(bench.folder / "model"), str(bench.folder)]
    subprocess.run(words, check=True)
    return time.monotonic() - began


def main() -> None:
    """Print the three times, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    first, again, peer = [], [], []
    with tempfile.TemporaryDirectory(prefix="dpo-restart-") as name:
        bench = Bench(Path(name), Path(sys.executable))
        bench.write_data("dialogue")
        of_peer(bench, "save")
        for round_ in range(options.rounds):
            first.append(until_step(bench, round_, again=False))
            again.append(until_step(bench, round_, again=True))
            steps = Finished(Path(name) / f"round {round_}" / "run").steps
            assert steps[:3] == [1, 2, 3], f"the second start repeated steps: {steps}"
            peer.append(of_peer(bench, "resume"))
    found = {"first_start_s": min(first), "restart_s": min(again), "plain_s": min(peer)}
    ratio = found["plain_s"] / found["restart_s"]
    for name, seconds in found.items():
        print(f"{name:14} {seconds:5.1f}")
    print(f"plain / restart: {ratio:.2f} × the time")
    print(json.dumps(found | {"ratio": ratio}))


if __name__ == "__main__":
    main()
