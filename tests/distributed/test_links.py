"""Slow links between ranks are found by exchanges of neighbours."""

import json
import time
from pathlib import Path

import pytest
import torch

from dpo_testing.gloo import run_ranks
from dpo_trainer import links
from dpo_trainer.distributed import World
from dpo_trainer.links import Link, judge, measure, rounds

TWO_NODES = ("a", "a", "a", "b", "b", "b")


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (("a", "a"), [[(0, 1)], [], [], []]),
        (("a", "b"), [[], [], [(0, 1)], []]),
        (TWO_NODES, [[(0, 1), (3, 4)], [(1, 2), (4, 5)], [(0, 3), (1, 4), (2, 5)], []]),
        (("a", "b", "c", "d"), [[], [], [(0, 1), (2, 3)], [(1, 2)]]),
        (("a", "b", "a", "b"), [[(0, 2), (1, 3)], [], [(0, 1), (2, 3)], []]),
    ],
)
def test_the_pairs_of_each_round(hosts: tuple[str, ...], expected: list[links.Pairs]) -> None:
    assert list(rounds(hosts)) == expected


def test_no_rank_is_twice_in_a_round_and_each_network_card_is_used() -> None:
    hosts = [f"node-{rank // 8}" for rank in range(40)]
    every = list(rounds(hosts))
    for pairs in every:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    across = {rank for pairs in every[2:] for pair in pairs for rank in pair}
    assert across == set(range(40))


def test_a_slow_link_is_named_among_those_of_its_kind() -> None:
    measured = [
        Link((0, 1), True, 300.0),
        Link((1, 2), True, 149.0),
        Link((3, 4), True, 310.0),
        Link((0, 3), False, 40.0),
        Link((1, 4), False, 21.0),
        Link((2, 5), False, 41.0),
    ]
    found = judge(measured, TWO_NODES)
    assert found.summary == "links: 300.0 GB/s within a node (median of 3), 40.0 GB/s between nodes (median of 3)"
    assert found.warnings == (
        "the link between ranks 1 (a) and 2 (a) is slow: 149.0 GB/s, where the median within a node is 300.0 GB/s",
    )


def test_of_two_links_the_slower_one_is_named_and_of_one_none() -> None:
    two = [Link((0, 1), True, 300.0), Link((2, 3), True, 100.0)]
    assert len(judge(two, "aabb").warnings) == 1
    assert judge(two[1:], "aabb").warnings == ()


def write_links(rank: int, slow: int, results: str) -> None:
    """Measure small messages; the rank ``slow`` sleeps in each of its own."""
    exchange = links._exchange

    def late(peer: int, out: torch.Tensor, into: torch.Tensor) -> float:
        time.sleep(0.1)
        return 0.1 + exchange(peer, out, into)

    if rank == slow:
        links._exchange = late
    links.LONGEST_SECONDS = 60.0  # all rounds, however slow this machine is
    world = World(rank, 3, 0, torch.device("cpu"))
    found = measure(world, "aaa", 1 << 16)
    assert (found is None) is (rank > 0)
    if found is not None:
        said = [*judge(found, "aaa").warnings, *(str(link.ranks) for link in found)]
        Path(results).write_text(json.dumps(said))


@pytest.mark.slow
def test_ranks_over_gloo_name_the_slow_one(tmp_path: Path) -> None:
    run_ranks(3, write_links, 2, str(tmp_path / "links"))
    warning, *measured = json.loads((tmp_path / "links").read_text())
    assert warning.startswith("the link between ranks 1 (a) and 2 (a) is slow: ")
    assert measured == ["(0, 1)", "(1, 2)"]
