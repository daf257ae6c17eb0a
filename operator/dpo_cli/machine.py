"""Finds this machine's GPUs and free ports without torch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping

from dpo_api.errors import AccessDeniedError, PortInUseError

TIMEOUT_SECONDS = 20.0


def gpu_count(environment: Mapping[str, str] | None = None) -> int:
    """Return how many NVIDIA GPUs a run could use: what `nvidia-smi -L` lists, within CUDA_VISIBLE_DEVICES."""
    return gpus(environment)[0]


def gpus(environment: Mapping[str, str] | None = None) -> tuple[int, str | None]:
    """Return ``gpu_count``, and the driver's name of the first GPU; None if there is none."""
    environment = os.environ if environment is None else environment
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        return 0, None
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0, None
    if listing.returncode != 0:
        return 0, None
    count = visible(count_listed(listing.stdout), environment.get("CUDA_VISIBLE_DEVICES"))
    return count, first_listed(listing.stdout) if count else None


def first_listed(listing: str) -> str | None:
    """Return the name of the first GPU in the output of `nvidia-smi -L`: `GPU 0: NVIDIA H200 (UUID: GPU-…)`."""
    first = next((line for line in listing.splitlines() if line.startswith("GPU ")), "")
    name = first.partition(": ")[2].partition(" (UUID")[0].strip()
    return name or None


def count_listed(listing: str) -> int:
    """Count the GPUs in the output of `nvidia-smi -L`: its lines that start with `GPU `, not the indented MIG ones."""
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def visible(present: int, variable: str | None) -> int:
    """Return how many of `present` GPUs CUDA_VISIBLE_DEVICES leaves; CUDA stops at the first invalid entry."""
    if variable is None:
        return present
    count = 0
    for entry in variable.split(","):
        name = entry.strip()
        if not name or (name.lstrip("-").isdigit() and not 0 <= int(name) < present):
            break
        count += 1
    return min(count, present)


def check_port(host: str, port: int) -> None:
    """Raise PortInUseError or AccessDeniedError if the trainer could not listen there. Called before loading torch."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the trainer's server does
            probe.bind(address)
            probe.listen()
    except PermissionError:
        raise AccessDeniedError(f"port {port} is not open to this user: choose one above 1023") from None
    except OSError as error:
        raise PortInUseError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from None
