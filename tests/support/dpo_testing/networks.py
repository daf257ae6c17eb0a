"""Two nodes as two network namespaces with one link, for tests of what a network does to a run.

A namespace lives as long as a process in it. Each has one that does nothing, which the kernel kills when the test
process ends: nothing is left, however that happens. What runs in a node is started with ``Node.environment``
(dpo_testing.preloaded). Only root can make namespaces, and only on Linux.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_testing.preloaded import NETWORK, usable

PROGRAMS = ("ip", "nsenter", "setpriv", "unshare")
INTERFACE = "eth0"
_GONE_SECONDS = 30.0


def missing() -> str | None:
    """Why no network can be made here; None if one can."""
    if not usable():
        return "needs processes that are forked (dpo_testing.preloaded)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"needs {', '.join(absent)} (iproute2, util-linux)" if absent else None


@dataclass(frozen=True)
class Node:
    """A network namespace."""

    rank: int
    holder: int
    """The process that keeps it."""

    @property
    def address(self) -> str:
        """Its IPv4 address on the link. The namespaces are new, so no other network is in the way."""
        return f"10.0.0.{self.rank + 1}"

    @property
    def file(self) -> Path:
        """The kernel's file of the namespace."""
        return Path(f"/proc/{self.holder}/ns/net")

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a preloaded process runs in this node."""
        return {NETWORK: str(self.file), "GLOO_SOCKET_IFNAME": INTERFACE}

    def ip(self, *words: str) -> None:
        """Run ip(8) in this node."""
        command = ["nsenter", "-t", str(self.holder), "-n", "ip", *words]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def processes(self) -> list[int]:
        """The processes in this node but its holder."""
        network, found = self.file.stat().st_ino, []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if (process / "ns/net").stat().st_ino == network and int(process.name) != self.holder:
                    found.append(int(process.name))
        return found

    def kill(self) -> None:
        """SIGKILL everything that runs in this node, as its loss would."""
        deadline = time.monotonic() + _GONE_SECONDS
        while running := self.processes():
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {running} do not end")
            time.sleep(0.02)


@dataclass(frozen=True)
class Network:
    """Two nodes and the link between them."""

    nodes: tuple[Node, Node]

    def cut(self) -> None:
        """Cut the link: nothing arrives, and no connection is closed."""
        self.nodes[1].ip("link", "set", INTERFACE, "down")

    def repair(self) -> None:
        """Make the link work again."""
        self.nodes[1].ip("link", "set", INTERFACE, "up")


@contextmanager
def two_nodes() -> Iterator[Network]:
    """Two nodes with a link. Raises CalledProcessError, with ip's words, where the kernel refuses."""
    holders: list[subprocess.Popen[str]] = []
    nodes: list[Node] = []
    try:
        for rank in range(2):
            command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo; exec sleep infinity"]
            holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            holders.append(holder)
            assert holder.stdout is not None
            if not holder.stdout.readline():
                raise subprocess.CalledProcessError(holder.wait(), command, stderr=holder.communicate()[1])
            nodes.append(Node(rank, holder.pid))
        one, other = nodes
        one.ip("link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(other.holder))
        for node in nodes:
            node.ip("address", "add", f"{node.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                node.ip("link", "set", interface, "up")
        yield Network((one, other))
    finally:
        for node in nodes:
            node.kill()
        for holder in holders:
            holder.kill()
            holder.communicate()
