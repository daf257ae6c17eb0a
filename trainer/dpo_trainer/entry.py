"""The trainer's commands: `launch` and `index` for users and pods; `agent` and `worker` are started by `launch`."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def command_line() -> argparse.ArgumentParser:
    """Return the parser of all commands but `agent`."""
    parser = argparse.ArgumentParser(prog="python -m dpo_trainer", description="Train one DPOJob.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "--selfcheck", action="store_true", help="check what this node has for training and report what is missing"
    )
    parser.add_argument("--gpus", type=int, help="with --selfcheck: number of GPUs that this node must have")
    parser.add_argument(
        "--s3",
        action="append",
        default=[],
        metavar="URI",
        help="with --selfcheck: a readable object or folder/",
    )
    parser.add_argument("--endpoint", help="with --selfcheck: the S3 server (default: boto3's usual sources)")
    commands = parser.add_subparsers(dest="command")

    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("--spec", type=Path, required=True, help="the DPOJob as JSON")
    run.add_argument(
        "--run-dir", help="run directory, a folder or s3:// prefix (default: checkpoint.uri, or runs/<name>)"
    )
    run.add_argument("--attempt", type=int, help="number of this attempt (default: the last one plus one)")
    run.add_argument("--events", type=Path, help="file to append progress to, one JSON object per line")
    run.add_argument("--port", type=int, help="port of /metrics, /status and /healthz on rank 0 (default: none)")
    run.add_argument("--host", default="", help="address to listen on (default: all)")

    launch = commands.add_parser("launch", parents=[run], help="start the processes of this node and wait for them")
    launch.add_argument(
        "--processes",
        type=int,
        help="processes on this node (default: PET_NPROC_PER_NODE, the spec's, one per GPU, 1)",
    )
    launch.add_argument(
        "--joined",
        action="store_true",
        help="run one process, with its place from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
    )
    launch.add_argument("--spec-digest", help="sha256:… of the spec's file; with another one nothing is started")
    launch.add_argument("--last-words", type=Path, help="file to write the outcome to (a pod's termination message)")
    launch.add_argument(
        "--grace-seconds", type=float, default=600.0, help="time to write a checkpoint when asked to stop"
    )

    worker = commands.add_parser("worker", parents=[run], help="one process of a run (started by launch)")
    worker.add_argument("--results", type=Path, required=True, help="folder for this rank's result")

    index = commands.add_parser("index", help="read and check all data without training; print a summary as JSON")
    index.add_argument("--spec", type=Path, required=True, help="the DPOJob as JSON")

    # Its arguments need torch: they are added when it is called.
    commands.add_parser("convert", help="write a model in another format", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (dpo_api.errors.Outcome)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["agent"]:  # its arguments are torchrun's
        from dpo_trainer.agent import agent

        return agent(words[1:])
    if words[:1] == ["convert"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it computes on the CPU, where equal bits give equal log-probs
        warnings.simplefilter("ignore")  # libraries' warnings of what they do not find
        from dpo_trainer.convert.command import main as convert

        return convert(words[1:])
    parser = command_line()
    arguments = parser.parse_args(words)
    if arguments.version:
        from dpo_api.version import VERSION

        print(f"dpo-trainer {VERSION}")
        return 0
    if arguments.selfcheck:
        from dpo_trainer.selfcheck import selfcheck

        return selfcheck(arguments.gpus, arguments.s3, arguments.endpoint)
    if arguments.command is None:
        parser.print_help()
        return 64
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "launch":
        from dpo_trainer.launch import launch

        return launch(arguments)
    if arguments.command == "worker":
        from dpo_trainer.parent import follow_parent

        follow_parent()  # before the imports, which take seconds
        from dpo_trainer.worker import work

        return work(arguments)
    from dpo_trainer.indexing import print_index

    return print_index(arguments.spec)
