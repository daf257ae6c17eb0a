"""Order is arithmetic: each pair once an epoch, the same batches whatever came before, for ever."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.blend import mean_weights, uses_per_epoch
from dpo_api.errors import InvalidSpecError
from dpo_api.plan import batches_per_epoch
from dpo_trainer.data.packs.order import Blend, batch_pairs, epoch_order, epoch_pairs, validation_batches

KNOWN = [[[1, 2, 6, 10, 2], [0, 5, 0, 1, 3], [9, 7]], [[1, 1, 0, 0, 2], [3, 3, 4, 11, 8], [4, 11]]]

sizes = st.integers(0, 400)
batch_sizes = st.integers(1, 70) | st.sampled_from([1, 2, 5])  # small ones often divide
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 5)


@given(sizes, seeds, epochs)
def test_an_epoch_is_a_permutation(pairs: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(pairs, seed, epoch).tolist()) == list(range(pairs))


@given(sizes, batch_sizes, seeds, epochs)
def test_each_pair_once_an_epoch_unless_the_last_batch_is_dropped(pairs: int, size: int, seed: int, epoch: int) -> None:
    kept = batch_pairs(pairs, size, seed, epoch, drop_last=False)
    assert sorted(np.concatenate([*kept, np.zeros(0, np.int64)]).tolist()) == list(range(pairs))
    assert all(len(batch) == size for batch in kept[:-1])
    assert all(len(batch) for batch in kept)

    dropped = batch_pairs(pairs, size, seed, epoch, drop_last=True)
    if pairs < size:
        assert [len(batch) for batch in dropped] == ([pairs] if pairs else [])
    else:
        assert [len(batch) for batch in dropped] == [size] * (pairs // size)
        assert len(set(np.concatenate(dropped).tolist())) == size * (pairs // size)
    for full, same in zip(dropped, kept, strict=False):
        assert full.tolist() == same.tolist()
    assert len(dropped) == batches_per_epoch(pairs, size, drop_last=True)
    assert len(kept) == batches_per_epoch(pairs, size, drop_last=False) == -(-pairs // size)


@given(st.integers(1, 200), batch_sizes, seeds, st.integers(0, 30))
def test_resume_continues_where_the_run_stopped(pairs: int, size: int, seed: int, done: int) -> None:
    """Global step s is batch s mod B of epoch s div B: the tail of a fresh run equals a run started at `done`."""
    count = batches_per_epoch(pairs, size, drop_last=True)

    def step(number: int) -> list[int]:
        return batch_pairs(pairs, size, seed, number // count, drop_last=True)[number % count].tolist()

    whole = [batch.tolist() for epoch in range(40) for batch in batch_pairs(pairs, size, seed, epoch, drop_last=True)]
    assert [step(number) for number in range(done, min(done + 5, len(whole)))] == whole[done : done + 5]


def test_dropped_pairs_differ_from_epoch_to_epoch() -> None:
    def dropped(epoch: int) -> frozenset[int]:
        return frozenset(range(100)) - set(np.concatenate(batch_pairs(100, 32, 1234, epoch, drop_last=True)).tolist())

    seen = [dropped(epoch) for epoch in range(6)]
    assert all(len(pairs) == 4 for pairs in seen)
    assert len(set(seen)) == 6


def test_seed_and_epoch_both_matter_and_do_not_mix() -> None:
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in (1, 11, 111) for epoch in (0, 1, 11)}
    assert len(set(orders.values())) == len(orders)


def test_every_position_is_equally_likely() -> None:
    """Mean position of pair 0 over 400 epochs: 49.5 ± 4 standard errors of a uniform variable."""
    places = [int(np.argmax(epoch_order(100, 7, epoch) == 0)) for epoch in range(400)]
    assert abs(np.mean(places) - 49.5) < 4 * 28.87 / 20


def philox_words(key: int, count: int) -> list[int]:
    """Philox 4x64-10 (Salmon et al. 2011), written out: what numpy's raw stream is, counter starting at 1."""
    mask = 2**64 - 1
    words: list[int] = []
    block = 0
    while len(words) < count:
        block += 1
        c0, c1, c2, c3 = block, 0, 0, 0
        k0, k1 = key & mask, key >> 64
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += [c0, c1, c2, c3]
    return words[:count]


@given(sizes, seeds, epochs)
def test_the_order_never_changes_between_versions(pairs: int, seed: int, epoch: int) -> None:
    """A resumed run may meet a newer library: the order is part of the format of a run directory."""
    digest = hashlib.sha256(f"dpo-operator pair order 1\n{seed}\n{epoch}".encode()).digest()
    words = philox_words(int.from_bytes(digest[:16], "little"), pairs)
    assert epoch_order(pairs, seed, epoch).tolist() == sorted(range(pairs), key=lambda pair: (words[pair], pair))


def test_the_order_of_a_small_set_is_known() -> None:
    assert epoch_order(12, 1234, 0).tolist() == [3, 4, 8, 11, 5, 1, 7, 0, 2, 6, 10, 9]
    assert epoch_order(12, 1234, 1).tolist() == [3, 2, 0, 1, 4, 6, 5, 7, 11, 9, 8, 10]


@given(sizes, batch_sizes)
def test_validation_is_file_order_and_whole(pairs: int, size: int) -> None:
    batches = validation_batches(pairs, size)
    assert [pair for batch in batches for pair in batch.tolist()] == list(range(pairs))
    assert all(len(batch) == size for batch in batches[:-1])


counts = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 0.1])), min_size=1, max_size=5
)


def blend_of(sources: list[tuple[int, float]]) -> Blend | None:
    pairs = tuple(count for count, _ in sources)
    try:
        return Blend(pairs, uses_per_epoch(pairs, [weight for _, weight in sources]))
    except InvalidSpecError:
        return None


@given(counts, seeds, epochs, batch_sizes, st.sampled_from([0.3, 1.0, 7.0]))
def test_equal_weights_change_nothing(
    sources: list[tuple[int, float]], seed: int, epoch: int, size: int, weight: float
) -> None:
    pairs = tuple(count for count, _ in sources)
    assert uses_per_epoch(pairs, [weight] * len(pairs)) == pairs
    total = sum(pairs)
    assert epoch_pairs(Blend(pairs, pairs), seed, epoch).tolist() == list(range(total))
    plain = batch_pairs(total, size, seed, epoch, drop_last=False)
    same = batch_pairs(total, size, seed, epoch, drop_last=False, blend=Blend(pairs, pairs))
    assert [batch.tolist() for batch in plain] == [batch.tolist() for batch in same]


@given(counts, st.sampled_from([0.5, 3.0]))
def test_weights_are_relative_and_an_epoch_keeps_its_length(sources: list[tuple[int, float]], factor: float) -> None:
    blend = blend_of(sources)
    if blend is None:
        return
    assert sum(blend.uses) == sum(blend.pairs)
    scaled = blend_of([(count, weight * factor) for count, weight in sources])
    assert scaled == blend or any(weight == 0.1 for _, weight in sources)  # 0.1 · 3 is not 0.3 in binary
    whole = sum(count * weight for count, weight in sources)
    for (count, weight), used in zip(sources, blend.uses, strict=True):
        assert not whole or abs(used - sum(blend.pairs) * count * weight / whole) < 1


@given(counts, seeds)
def test_a_pair_is_used_again_only_after_all_others_of_its_source(sources: list[tuple[int, float]], seed: int) -> None:
    blend = blend_of(sources)
    if blend is None:
        return
    total = sum(blend.pairs)
    seen = np.zeros(total, dtype=np.int64)
    for epoch in range(4):
        used = np.concatenate(
            [*batch_pairs(total, 7, seed, epoch, drop_last=False, blend=blend), np.zeros(0, np.int64)]
        )
        assert len(used) == total
        np.add.at(seen, used, 1)
        first = 0
        for pairs, uses in zip(blend.pairs, blend.uses, strict=True):
            own = seen[first : first + pairs]
            assert own.sum() == (epoch + 1) * uses
            assert pairs == 0 or own.max() - own.min() <= 1
            first += pairs


def test_the_order_of_a_weighted_set_is_known() -> None:
    """4 pairs of weight 3 and 8 of weight 1: 12 · 12/20 = 7.2 and 4.8 uses. The order is part of a run directory."""
    blend = Blend((4, 8), uses_per_epoch((4, 8), (3.0, 1.0)))
    assert blend.uses == (7, 5)
    assert str(blend) == "7 of 4, 5 of 8"
    batches = [batch_pairs(12, 5, 1234, epoch, drop_last=False, blend=blend) for epoch in range(2)]
    assert [[batch.tolist() for batch in epoch] for epoch in batches] == KNOWN


def test_a_source_whose_weight_leaves_it_no_use_is_refused() -> None:
    with pytest.raises(
        InvalidSpecError, match=r"train\[1\].weight: 0.001 leaves its 3 pairs less than one of the 13 uses"
    ):
        uses_per_epoch((10, 3), (1.0, 0.001))
    assert uses_per_epoch((10, 0), (1.0, 0.001)) == (10, 0)


def test_factors_of_a_mean_keep_its_number_of_pairs() -> None:
    assert mean_weights((3, 50), (0.1, 0.1)) == (1.0, 1.0)
    assert mean_weights((10, 30), (3.0, 1.0)) == (2.0, 2 / 3)
