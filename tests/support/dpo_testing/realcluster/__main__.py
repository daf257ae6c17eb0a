"""``python -m dpo_testing.realcluster up | down | status | times``."""

from __future__ import annotations

import argparse
import sys
import time

from dpo_testing.realcluster import cluster, daemons, machine, sweep
from dpo_testing.realcluster.layout import Layout
from dpo_testing.realcluster.steps import Steps


def main() -> int:
    """Do what the first word says."""
    parser = argparse.ArgumentParser(prog="realcluster", description="A real Kubernetes cluster of this one machine.")
    parser.add_argument("what", choices=("up", "down", "status", "times", "logs", "suitable"))
    what = parser.parse_args().what
    layout = Layout.default()
    if what == "suitable":
        why = machine.unsuitable(layout)
        print(why or "yes")
        return 0 if why is None else 3
    if what == "up":
        print("cluster up", flush=True)
        (layout.run / "times.jsonl").unlink(missing_ok=True)
        try:
            cluster.up(layout)
        except machine.UnsuitableError as error:
            print(f"no cluster here: {error}", file=sys.stderr)
            return 3
        print(f"  {cluster.sizes(layout)}\n  kubeconfig: {layout.admin}")
        return 0
    if what == "down":
        began = time.monotonic()
        foreign = machine.foreign_links(layout)  # noted in the run folder, which goes
        sweep.down(layout)
        left = sweep.leftovers(layout, foreign)
        print(
            f"cluster down in {time.monotonic() - began:.1f} s; " + ("left over:" if left else "nothing is left over")
        )
        print(*(f"  {line}" for line in left), sep="\n", end="\n" if left else "")
        return 1 if left else 0
    if what == "times":
        print(Steps(layout.run / "times.jsonl").table())
        return 0
    if what == "logs":
        for name in daemons.names(layout):
            print(f"== {name}\n{daemons.log_tail(layout, name, 1500)}")
        return 0
    for name in daemons.names(layout):
        print(f"  {name:26} {daemons.running(layout, name) or 'has ended'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
