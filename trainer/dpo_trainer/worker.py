"""One process of a run: does the work and writes a result that says how it ended."""

import argparse
import errno
import logging
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed.distributed_c10d import _get_default_store

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core
from dpo_api.errors import DPOError, Outcome
from dpo_api.manifest import load_manifest
from dpo_trainer.distributed import World, lost_contact
from dpo_trainer.failures import of_text
from dpo_trainer.layouts import agreed, hardware_here
from dpo_trainer.results import RankResult
from dpo_trainer.run import Run, RunOptions, at_first_commits, directory_of
from dpo_trainer.stopping import StopRequest
from dpo_trainer.waiting import Watch, stall_timeout, step_limit

_OUTCOME_OF_ERRNO = {
    errno.ENOSPC: Outcome.NoSpace,
    errno.EDQUOT: Outcome.NoSpace,
    errno.EFBIG: Outcome.NoSpace,
    errno.EACCES: Outcome.AccessDenied,
    errno.EROFS: Outcome.AccessDenied,
}


def explain(error: BaseException) -> tuple[Outcome, str]:
    """Return the outcome and the message of the error that ended this process."""
    if isinstance(error, DPOError):
        return error.outcome, str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Outcome.OutOfMemory, (
            f"out of memory: {error}. Lower training.packing.maxTokens or data.maxLength, use LoRA, or more processes"
        )
    if isinstance(error, OSError) and error.errno in _OUTCOME_OF_ERRNO:
        where = error.filename or "a file of the run directory, of the cache (DPO_CACHE_DIR) or of TMPDIR"
        return _OUTCOME_OF_ERRNO[error.errno], f"{where}: {error.strerror}"
    if isinstance(error, RuntimeError) and (found := of_text(str(error))) is not None:
        outcome, advice = found
        return outcome, f"{_first_line(error)}; {advice}"
    if lost_contact(error):
        return Outcome.Communication, f"lost contact with another process ({_first_line(error)})"
    return Outcome.Internal, f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def work(arguments: argparse.Namespace) -> NoReturn:
    """Run this process's part, and exit with the outcome's code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    rank = int(os.environ.get("RANK", "0"))
    run: Run | None = None
    watch: Watch | None = None
    try:
        job = load_manifest(arguments.spec, stored=True)
        stop = StopRequest(limit_seconds=job.spec.training.max_run_seconds)
        options = RunOptions.of(arguments)
        world = World.connect()
        directory = directory_of(job, options)
        job = at_first_commits(job, world, directory)
        decision = agreed(job.spec, world, directory, hardware_here(world.size))
        layout = decision.layout
        world.divide(
            tensor=layout.tensor, pipeline=layout.pipeline, context=layout.context, seed=job.spec.training.seed
        )
        # Until all processes have joined there is nothing to save, and a signal ends this process directly. If it
        # only set the flag, the processes that have joined would wait for those that the signal ended.
        stop.listen()
        run = Run(job, world, stop, options, decision)
        watch = _watch(run, rank, arguments.results) if world.size > 1 else None
        run.execute()
        if watch is not None:
            watch.stop()
        result = run.result(rank, Outcome.Succeeded, "")
    except BaseException as error:  # noqa: BLE001 - whatever it is becomes this rank's result
        outcome, message = explain(error)
        if run is not None and isinstance(error, torch.OutOfMemoryError) and (instead := run.take_runner_up()):
            outcome, message = Outcome.LayoutTooLarge, instead
        explains = False
        if watch is not None:
            watch.stop()
            found = watch.verdict() if outcome is Outcome.Communication else None
            message, explains = found or message, found is not None
        if outcome is Outcome.Internal:
            with suppress(OSError):  # the log may be on the disk that is full
                traceback.print_exc()
        if run is not None:
            result = replace(run.result(rank, outcome, message), explains=explains)
        else:
            result = RankResult(rank=rank, outcome=outcome.name, message=message, at=time.time())
        _fail(result, run, arguments.results)
    result.write(arguments.results)
    world.leave()
    _exit(Outcome.Succeeded)


def _watch(run: Run, rank: int, results: Path) -> Watch:
    """Start watching for waits that are too long. They end this process."""

    def give_up(message: str) -> None:
        _fail(replace(run.result(rank, Outcome.Communication, message), explains=True), run, results)

    limit = step_limit(stall_timeout(run.spec.run_policy, os.environ))
    watch = Watch(run.world.place, rank, run.world.size, _get_default_store(), limit=limit, give_up=give_up)
    watch.start()
    return watch


_FAILING = threading.Lock()


def _fail(result: RankResult, run: Run | None, results: Path) -> NoReturn:
    """Write the result, report the end, and exit. If two threads fail, the first one does it."""
    _FAILING.acquire()
    # Before anything else: the launcher gives more time to processes that have written their result.
    with suppress(OSError):
        result.write(results)
    if run is not None:
        run.failed(Outcome[result.outcome], result.message)
    # Destroying the process groups would wait for ranks that may themselves wait for this one in a collective.
    _exit(Outcome[result.outcome])


def _exit(outcome: Outcome) -> NoReturn:
    """End this process at once.

    An ordinary end would first run the destructors of CUDA's libraries, which read up to 130 MiB of their files.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(outcome.exit_code)
