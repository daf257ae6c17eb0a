"""Order is arithmetic: each pair once an epoch, the same batches whatever came before, for ever."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.plan import batches_per_epoch
from dpo_trainer.data.order import batch_pairs, epoch_order, validation_batches

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
