"""Context parallelism without processes: each rank's share of a pack, and its attention over the gathered keys."""

import importlib
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_testing import flashattention
from dpo_testing.pairs import Pairs, pack_of
from dpo_trainer.data.packs.collate import FILLER_PAIR, make_pack
from dpo_trainer.model.attend import attend, attend_at_once, attend_by_piece
from dpo_trainer.model.context import chunks_of, sequences_of, share_of
from dpo_trainer.model.pack import Pack, Segment
from dpo_trainer.model.varlen import Piece, pieces_of, plan_of, spread

CALLS = pytest.mark.parametrize(
    "calls", [attend, attend_by_piece, attend_at_once], ids=["on CPU", "by piece", "at once"]
)
FORMS = {
    "shared": pack_of(0, 1, 2, 3),
    "unshared": pack_of(0, 1, 2, 3, share=False),
    "without rejected": pack_of(0, 1, 2, 3, with_rejected=False),
}
HEADS, GROUPS, SIZE = 4, 2, 8


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel for sequences of unlike lengths runs on GPUs only."""
    attend_module = importlib.import_module("dpo_trainer.model.attend")
    monkeypatch.setattr(attend_module, "varlen_kernel", lambda: (flashattention.varlen_attn, True))


def shares(pack: Pack, size: int, multiple: int = 1) -> list[Pack]:
    return [share_of(pack, rank, size, multiple) for rank in range(size)]


def test_a_rank_has_an_early_and_a_late_chunk_of_each_sequence() -> None:
    """8 tokens of prompt and chosen, 4 of rejected, which sees the 4 of the prompt and no chosen one."""
    segments = (Segment(0, 4), Segment(4, 8, parent=0), Segment(8, 12, parent=0))
    assert chunks_of(segments, 2) == (
        (
            Piece(0, 2, ((0, 2),)),
            Piece(6, 8, ((0, 8),)),
            Piece(8, 9, ((0, 4), (8, 9))),
            Piece(11, 12, ((0, 4), (8, 12))),
        ),
        (
            Piece(2, 4, ((0, 4),)),
            Piece(4, 6, ((0, 6),)),
            Piece(9, 10, ((0, 4), (8, 10))),
            Piece(10, 11, ((0, 4), (8, 11))),
        ),
    )


def test_sequences_over_the_gathered_stream() -> None:
    """Rank 0's tokens 0 1 6 7 8 11 come first, then rank 1's 2 3 4 5 9 10: keys are in the order of their positions."""
    pack = make_pack(Pairs([(4, 4, 4)]), [0], share=True)
    first, second = shares(pack, 2)
    assert sequences_of(first)[1:] == (
        Piece(2, 4, ((0, 2), (6, 8), (8, 10), (2, 4))),
        Piece(4, 5, ((0, 2), (6, 8), (4, 5))),
        Piece(5, 6, ((0, 2), (6, 8), (4, 5), (10, 11), (11, 12), (5, 6))),
    )
    assert sequences_of(second)[0] == Piece(6, 8, ((0, 2), (6, 8)))


lengths = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))


@given(st.lists(lengths, min_size=1, max_size=5), st.integers(2, 5), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_each_token_and_each_label_is_on_one_rank(
    sizes: list[tuple[int, int, int]], ranks: int, multiple: int, share: bool
) -> None:
    """Together the shares have the pack's tokens and (token, position, label, response) once each."""
    pack = make_pack(Pairs(sizes), range(len(sizes)), share=share)
    found = shares(pack, ranks, multiple)
    assert len({part.length for part in found}) == 1
    assert found[0].length % multiple == 0

    def tokens(*packs: Pack) -> list[Any]:
        columns = ((p.origins, p.position_ids, p.tokens) for p in packs)
        rows = [row for three in columns for row in torch.stack(three, 1).tolist()]
        return sorted(row for row in rows if row[0] >= 0)

    def predictions(*packs: Pack) -> list[Any]:
        columns = ((p.tokens[p.rows], p.position_ids[p.rows], p.labels, p.owners) for p in packs)
        return sorted(row for four in columns for row in torch.stack(four, 1).tolist())

    assert tokens(*found) == tokens(pack)
    assert predictions(*found) == predictions(pack)
    for part in found:
        assert bool((part.origins[part.rows] >= 0).all())
        assert torch.equal(part.pairs, pack.pairs)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_equal_work(ranks: int) -> None:
    """Of long sequences, each rank's queries see the same number of keys, within 1 %."""
    chunks = chunks_of((Segment(0, 800), Segment(800, 1600, parent=0), Segment(1600, 2400, parent=0)), ranks)
    work = [sum(c.length * (c.key_count - c.length) + c.length * (c.length + 1) // 2 for c in own) for own in chunks]
    assert sum(work) == 1600 * 1601 // 2 + 800 * 800 + 800 * 801 // 2
    assert max(work) <= 1.01 * min(work)


# -- attention


def qkv(pack: Pack) -> list[Tensor]:
    """Random q, k and v of a whole pack."""
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randn(pack.length, heads, SIZE, generator=draw, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS)
    ]


def rows_of(part: Pack, whole: Pack) -> Tensor:
    """For each of a share's tokens, its row in the whole pack; -1 for padding."""
    place = {key: row for row, key in enumerate(zip(whole.origins.tolist(), whole.position_ids.tolist(), strict=True))}
    keys = zip(part.origins.tolist(), part.position_ids.tolist(), strict=True)
    return torch.tensor([place[key] if key[0] >= 0 else -1 for key in keys])


def run(q: Tensor, k: Tensor, v: Tensor, pieces: tuple[Piece, ...], calls: Any, window: int | None) -> Tensor:
    plan = plan_of(pieces, len(k))
    result: Tensor = calls(q, spread(k, plan), spread(v, plan), plan, window, None)
    return result


CASES = list(product(["shared", "without rejected"], (2, 3), (None, 7)))


@pytest.mark.parametrize(("form", "ranks", "window"), CASES, ids=[f"{f}-{r}-{w}" for f, r, w in CASES])
@CALLS
def test_the_ranks_attention_is_that_of_one(form: str, ranks: int, window: int | None, calls: Any) -> None:
    """Each token's output, and the sums over ranks of dK and dV, which the reduce-scatter makes."""
    whole = FORMS[form]
    inputs = [x.requires_grad_() for x in qkv(whole)]
    weight = torch.randn(whole.length, HEADS * SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = run(*inputs, pieces_of(whole.segments, whole.length), calls, window)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)

    parts = shares(whole, ranks, 4)
    rows = [rows_of(part, whole) for part in parts]
    assert sorted(row for own in rows for row in own.tolist() if row >= 0) == list(range(whole.used))
    together = torch.cat(rows)
    sums = [torch.zeros_like(x) for x in inputs]
    for part, own in zip(parts, rows, strict=True):
        q, k, v = inputs[0][own], inputs[1][together], inputs[2][together]
        out = run(q, k, v, sequences_of(part), calls, window)
        torch.testing.assert_close(out[own >= 0], expected[own[own >= 0]], rtol=0, atol=1e-12)
        assert bool((out[own < 0] == 0).all())
        found = torch.autograd.grad((out * weight[own]).sum(), inputs)
        sums = [total + gradient for total, gradient in zip(sums, found, strict=True)]
    for got, wanted in zip(sums, gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_nothing_leaks_between_responses_on_any_rank(ranks: int) -> None:
    whole = FORMS["shared"]
    parts = shares(whole, ranks)
    sides = torch.cat([part.origins for part in parts])
    for part in parts:
        keys = plan_of(sequences_of(part), ranks * part.length)
        for piece, first, last in zip(keys.pieces, keys.cu_k[:-1].tolist(), keys.cu_k[1:].tolist(), strict=True):
            if piece.padding:
                continue
            asks, seen = sides[piece.start : piece.end], sides[keys.keys[first:last]]
            assert set((seen // 3).tolist()) == set((asks // 3).tolist())
            assert set((seen % 3).tolist()) <= ({0, 2} if 2 in (asks % 3).tolist() else {0, 1})


@CALLS
def test_a_rank_without_tokens_has_gradients_of_zero(calls: Any) -> None:
    """So that it takes part in the others' reductions. A filler's 3 tokens are too few for four ranks."""
    part = share_of(make_pack(Pairs(), [FILLER_PAIR], share=True), 1, 4)
    assert part.origins.tolist() == [-1, -1]
    sizes = ((2, HEADS), (8, GROUPS), (8, GROUPS))
    q, k, v = (torch.randn(count, heads, SIZE, requires_grad=True) for count, heads in sizes)
    out = run(q, k, v, sequences_of(part), calls, None)
    assert bool((out == 0).all())
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert bool((gradient == 0).all())


def test_one_rank_has_the_pack_itself() -> None:
    pack = FORMS["shared"]
    assert share_of(pack, 0, 1) is pack
    assert sequences_of(pack) == pieces_of(pack.segments, pack.length)
