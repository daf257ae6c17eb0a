"""Finds this process's place among those that torchrun or srun has started, as each PyTorch program does.

Each of them runs `dpo run` with the same manifest, and each is one training process: they join each other instead of
starting others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dpo_api.errors import UsageError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FIRST_PORT, _PORTS = 10_000, 20_000
"""Below the ports that Linux gives to outgoing connections."""


@dataclass(frozen=True)
class Member:
    """One of the processes."""

    starter: str
    """The command that started them."""
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    """Processes on this node; None: unknown."""
    address: str
    """Host of rank 0."""
    port: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reports for all."""
        return self.rank == 0

    def environment(self, gpus: int) -> dict[str, str]:
        """Return the variables of the training process; gpus: how many are visible to it."""
        # With srun --gpus-per-task=1 each task has its own GPU alone.
        local_rank = 0 if gpus == 1 and self.starter == "srun" else self.local_rank
        found = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": local_rank,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        if self.local_size is not None:
            found["LOCAL_WORLD_SIZE"] = self.local_size
        return {name: str(value) for name, value in found.items()}

    def nodes(self, gpus: int) -> tuple[int, int]:
        """Return the number of nodes and of processes on each; a node for each process where nodes differ.

        gpus: of this node, in case nothing says how many processes it has.
        """
        each = self.local_size or min(max(1, gpus), self.size)
        return (self.size, 1) if self.size % each else (self.size // each, each)


def member(environment: Mapping[str, str]) -> Member | None:
    """Return this process's place; None if nobody has started several: then `dpo run` starts the processes.

    torchrun's variables come first: torchrun may itself be started by srun. Raises UsageError naming the variable that
    is missing or wrong.
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _of_torchrun(environment)
    # A batch script without srun has SLURM_PROCID and SLURM_NTASKS, too, but no other process beside it.
    if _number(environment, "SLURM_STEP_NUM_TASKS", least=1, otherwise=1, starter="srun") > 1:
        return _of_srun(environment)
    return None


def _of_torchrun(environment: Mapping[str, str]) -> Member:
    missing = [name for name in _TORCHRUN if not environment.get(name)]
    if missing:
        given = next(name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment)
        raise UsageError(
            f"{missing[0]} is not set, but {given} is: torchrun sets {', '.join(_TORCHRUN)}. Set all of them to join"
            f" its other processes, or unset {given} to start the processes from here"
        )
    size = _number(environment, "WORLD_SIZE", least=1, starter="torchrun")
    rank = _number(environment, "RANK", below=size, starter="torchrun", of="WORLD_SIZE")
    local_size = _number(environment, "LOCAL_WORLD_SIZE", least=1, otherwise=0, starter="torchrun")
    return Member(
        starter="torchrun",
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", below=local_size or size, starter="torchrun", of="its node"),
        local_size=local_size or None,
        address=environment["MASTER_ADDR"],
        port=_port(environment, "torchrun"),
    )


def _of_srun(environment: Mapping[str, str]) -> Member:
    size = _number(environment, "SLURM_STEP_NUM_TASKS", least=1, starter="srun")
    rank = _number(environment, "SLURM_PROCID", below=size, starter="srun", of="SLURM_STEP_NUM_TASKS")
    # "8(x4)": four nodes with eight tasks each. Nodes with other numbers follow after a comma.
    tasks = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_size = int(tasks[1]) if tasks else None
    address = environment.get("MASTER_ADDR") or first_host(
        environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or ""
    )
    if not address:
        raise UsageError(
            "SLURM_NODELIST is not set or names no host, but srun started this process: set it, or MASTER_ADDR to the"
            " host of task 0"
        )
    return Member(
        starter="srun",
        rank=rank,
        size=size,
        local_rank=_number(environment, "SLURM_LOCALID", below=local_size or size, starter="srun", of="its node"),
        local_size=local_size,
        address=address,
        port=_port(environment, "srun") if "MASTER_PORT" in environment else _port_of_job(environment),
    )


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's list of nodes, such as ``gpu[03-06,9],login1``; empty if it has none."""
    found = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", nodes)
    return "" if found is None else "".join(part or "" for part in found.groups())


def _port_of_job(environment: Mapping[str, str]) -> int:
    """Return a port that all tasks of a step agree on, and that other steps on a node hardly have."""
    job = _number(environment, "SLURM_JOB_ID", starter="srun")
    return _FIRST_PORT + (job + _number(environment, "SLURM_STEP_ID", otherwise=0, starter="srun")) % _PORTS


def _port(environment: Mapping[str, str], starter: str) -> int:
    return _number(environment, "MASTER_PORT", least=1, below=65_536, starter=starter)


def _number(
    environment: Mapping[str, str],
    name: str,
    *,
    starter: str,
    least: int = 0,
    below: int | None = None,
    otherwise: int | None = None,
    of: str = "",
) -> int:
    """Return a variable's value; ``otherwise`` if it is not set. ``of``: what ``below`` is the size of."""
    text = environment.get(name)
    if text is None and otherwise is not None:
        return otherwise
    if text is None:
        raise UsageError(f"{name} is not set, but {starter} started this process: start it with {starter}")
    if not text.isascii() or not text.isdigit() or int(text) < least or (below is not None and int(text) >= below):
        most = "" if below is None else f" to {below - 1}" + (f", as {of} has {below} processes" if of else "")
        raise UsageError(f"{name} is {text!r}: it must be a whole number from {least}{most}")
    return int(text)
