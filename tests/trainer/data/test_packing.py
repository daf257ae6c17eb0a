"""Packing and dealing: nothing lost, nothing twice, within budget, the same on every rank."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.plan import make_plan
from dpo_testing.manifests import spec
from dpo_trainer.batches import Packer
from dpo_trainer.data.packs.packing import deal, pack_batch, pair_cost

costs_of_a_batch = st.lists(st.integers(1, 300), max_size=80)


@given(costs_of_a_batch, st.integers(100, 600), st.none() | st.integers(1, 9), st.integers(1, 9))
def test_packs_hold_each_pair_once_within_both_bounds(
    costs: list[int], budget: int, most: int | None, ranks: int
) -> None:
    packs = pack_batch(costs, budget, most, ranks=ranks)
    assert sorted(pair for pack in packs for pair in pack) == list(range(len(costs)))
    assert all(packs)
    for pack in packs:
        assert sum(costs[pair] for pair in pack) <= budget or len(pack) == 1
        assert most is None or len(pack) <= most
    assert packs == pack_batch(list(costs), budget, most, ranks=ranks)


@given(costs_of_a_batch, st.integers(100, 600))
def test_first_fit_decreasing_keeps_its_bound(costs: list[int], budget: int) -> None:
    """Dósa (2007): FFD ≤ 11/9 OPT + 6/9, and OPT ≥ ⌈sum / budget⌉; checked with the weaker bound on OPT."""
    fitting = [cost for cost in costs if cost <= budget]
    packs = pack_batch(fitting, budget, None)
    loads = sorted(sum(fitting[pair] for pair in pack) for pack in packs)
    # No two packs could be one: first fit would have put the later pack's pairs into the earlier.
    assert all(first + second > budget for first, second in itertools.pairwise(loads))


def test_first_fit_decreasing_by_hand() -> None:
    # 7+3, 6+2 (5 does not fit, 2 and 1 do), 5
    assert pack_batch([2, 7, 5, 3, 6, 1], 10, None) == [[1, 3], [0, 4, 5], [2]]


def test_one_pair_a_pack_is_packing_switched_off() -> None:
    assert sorted(pack_batch([5, 5, 5], 1000, 1)) == [[0], [1], [2]]


def test_a_batch_that_fits_one_pack_is_spread_over_idle_ranks() -> None:
    packs = pack_batch([10, 20, 30, 40], 1000, None, ranks=2)
    assert sorted(packs) == [[0, 3], [1, 2]]


def test_a_pair_over_the_budget_is_a_pack_of_its_own() -> None:
    assert pack_batch([10, 500, 20], 100, None) == [[1], [0, 2]]


@given(costs_of_a_batch, st.integers(100, 600), st.integers(1, 9))
def test_dealing_loses_nothing_and_ranks_agree_on_the_number_of_packs(
    costs: list[int], budget: int, ranks: int
) -> None:
    packs = pack_batch(costs, budget, None, ranks=ranks)
    tokens = [sum(costs[pair] for pair in pack) for pack in packs]
    hands = deal(packs, tokens, ranks)
    assert len(hands) == ranks
    assert len({len(hand) for hand in hands}) == 1
    assert len(hands[0]) == max(1, -(-len(packs) // ranks))
    assert sorted(pair for hand in hands for pack in hand for pair in pack) == list(range(len(costs)))


def test_fewer_pairs_than_ranks_gives_fillers() -> None:
    assert deal(pack_batch([5, 9], 100, None, ranks=4), [9, 5], 4) == [[[1]], [[0]], [[]], [[]]]
    assert deal([], [], 2) == [[[]], [[]]]


def test_dealing_balances_tokens() -> None:
    hands = deal([[0], [1], [2], [3]], [10, 9, 2, 1], 2)
    assert sorted(sorted(pack[0] for pack in hand) for hand in hands) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(("share", "rejected", "cost"), [(True, 4, 16), (False, 4, 26), (True, 0, 12), (False, 0, 12)])
def test_cost_counts_the_tokens_of_the_stream(share: bool, rejected: int, cost: int) -> None:
    assert pair_cost(10, 2, rejected, share=share) == cost


@pytest.mark.parametrize(
    ("device", "length", "most", "expected"),
    [
        ("cpu", 2048, None, 1024),
        ("cpu", 500, None, 1000),
        ("cpu", 2048, 4096, 4096),
        ("cuda", 2048, None, 4096),
        ("cuda", 2048, 8192, 8192),
    ],
)
def test_the_size_of_a_pack_that_is_not_set_is_small_on_cpus(
    device: str, length: int, most: int | None, expected: int
) -> None:
    packing = {} if most is None else {"training.packing.maxTokens": most}
    found = spec({"data.maxLength": length, **packing})
    assert Packer.of(found, make_plan(found, 8, ()), torch.device(device)).max_tokens == expected
