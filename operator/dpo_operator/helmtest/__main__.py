from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

import yaml

from dpo_api.version import VERSION
from dpo_operator.helmtest import job, world
from dpo_operator.runtime.client import Client
from dpo_operator.runtime.login import LoginError, connection


def main() -> int:
    """Make the data, or run the job; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dpo_operator.helmtest", description="What `helm test` runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write a tiny model and preferences")
    make.add_argument("folder", type=Path)
    for name, text in (("run", "run a DPOJob to its end"), ("clear", "delete the DPOJob that a failed test left")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--file", type=Path, required=True, help="manifest of the DPOJob")
        command.add_argument("--namespace", required=True)
        command.add_argument("--claim", default="", help="with run: delete this PersistentVolumeClaim after success")
        command.add_argument("--seconds", type=float, default=600.0, help="time limit; default %(default)s")
    arguments = parser.parse_args()
    try:
        if arguments.command == "make":
            made = world.make(arguments.folder)
            print(
                f"{arguments.folder}: a model of {made['parameters']} parameters, {made['train']} pairs to learn from"
            )
        else:
            asyncio.run(_with_cluster(arguments))
    except (job.HelmTestError, LoginError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _with_cluster(arguments: argparse.Namespace) -> None:
    # Each test gets its own run directory: an earlier test's would already be finished.
    manifest = yaml.safe_load(arguments.file.read_text(encoding="utf-8").replace("@TIME@", str(int(time.time()))))
    client = Client(connection, user_agent=f"dpo-helmtest/{VERSION}")
    try:
        if arguments.command == "clear":
            await job.clear(client, arguments.namespace, manifest["metadata"]["name"], seconds=arguments.seconds)
            return
        status = await job.run(
            client, arguments.namespace, manifest, seconds=arguments.seconds, claim=arguments.claim,
            tell=lambda text: print(text, flush=True),
        )  # fmt: skip
    finally:
        await client.close()
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in sorted((status.get("finalMetrics") or {}).items()))
    print(f"it works: {status.get('modelURI', 'no model')}; {metrics}")


if __name__ == "__main__":
    sys.exit(main())
