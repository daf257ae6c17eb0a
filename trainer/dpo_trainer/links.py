"""Finds slow links between a run's GPUs before the model is loaded: a broken cable costs every step of a run.

Neighbours on a node exchange a message, then the ranks with one place on neighbouring nodes, all pairs of a round at
once. A pair that is much slower than the others of its kind is named.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_trainer.distributed import World

LONGEST_SECONDS = 10.0
"""No round begins after this time."""

MESSAGE_BYTES = 64 * 2**20
REPEATS = 5
"""The fastest exchange counts: others may wait for a process that comes late."""

SLOW_FACTOR = 2.0
"""How many times slower than the median a pair must be. Links of one kind differ by less."""

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Link:
    """Two ranks, and what they send each other at once."""

    ranks: tuple[int, int]
    one_host: bool
    speed: float
    """GB/s in each direction."""


@dataclass(frozen=True)
class Found:
    """What was measured, in sentences."""

    summary: str
    warnings: tuple[str, ...]


def rounds(hosts: Sequence[str]) -> Iterator[Pairs]:
    """Yield the pairs that exchange at once, in which no rank is twice. hosts: of each rank."""
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    within = [list(pairwise(ranks)) for ranks in nodes.values()]
    across = [list(zip(one, other, strict=False)) for one, other in pairwise(nodes.values())]
    for parity in (0, 1):
        yield [pair for pairs in within for pair in pairs[parity::2]]
    for parity in (0, 1):
        yield [pair for pairs in across[parity::2] for pair in pairs]


def measure(world: World, hosts: Sequence[str], size: int = MESSAGE_BYTES) -> list[Link] | None:
    """Return the links between neighbours, on rank 0; None on the others. A collective. size: bytes of a message.

    Those of rounds for which no time was left are missing.
    """
    began = time.monotonic()
    out, into = (torch.zeros(size, dtype=torch.uint8, device=world.device) for _ in range(2))
    links: list[Link] = []
    for pairs in rounds(hosts):
        if not pairs:
            continue
        peer = next((sum(pair) - world.rank for pair in pairs if world.rank in pair), None)
        seconds = 0.0 if peer is None else min(_exchange(peer, out, into) for _ in range(1 + REPEATS))
        took = world.to_main(seconds)
        if took is not None:
            for one, other in pairs:
                speed = size / max(took[one], took[other]) / 1e9
                links.append(Link((one, other), hosts[one] == hosts[other], speed))
        if world.any(time.monotonic() - began > LONGEST_SECONDS):
            break
    return links if world.is_main else None


def _exchange(peer: int, out: Tensor, into: Tensor) -> float:
    """Send and receive a message at once; return the seconds."""
    began = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]):
        work.wait()
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return time.perf_counter() - began


def judge(links: Sequence[Link], hosts: Sequence[str]) -> Found:
    """Compare each link with the median of its kind: of two links, with the faster one."""
    said, warnings = [], []
    for one_host, kind in ((True, "within a node"), (False, "between nodes")):
        like = [link for link in links if link.one_host is one_host]
        if not like:
            continue
        median = statistics.median_high(link.speed for link in like)
        said.append(f"{median:.1f} GB/s {kind} (median of {len(like)})")
        for link in sorted(like, key=lambda link: link.speed):
            if link.speed * SLOW_FACTOR < median:
                one, other = (f"{rank} ({hosts[rank]})" for rank in link.ranks)
                warnings.append(
                    f"the link between ranks {one} and {other} is slow: {link.speed:.1f} GB/s, where the median {kind}"
                    f" is {median:.1f} GB/s"
                )
    return Found("links: " + ", ".join(said), tuple(warnings))
