"""The division of the LM head's rows: its bytes, what is kept, and that chunks are even."""

import math

import pytest

from dpo_api.sizing.head import CPU_BUDGET_BYTES, GPU_BUDGET_BYTES, HeadChunks, head_bytes, head_chunks


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("budget", [2**10, 2**26, CPU_BUDGET_BYTES, GPU_BUDGET_BYTES])
@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [(0, 10), (1, 10), (1024, 128_256), (131, 128_256), (9000, 128_256), (5000, 32_001), (3, 2**30)],
)
def test_a_division_keeps_its_budget_and_is_even(rows: int, vocabulary: int, budget: int, keep: bool) -> None:
    for value in (2, 4):
        chunks = head_chunks(rows, vocabulary, value, budget, keep=keep)
        one = value * 8 * math.ceil(vocabulary / 8)
        assert head_bytes(chunks, vocabulary, value) <= max(budget, one)
        if keep and rows * one <= budget:
            assert chunks == HeadChunks(rows, 0)
            continue
        most = max(1, budget // 8 // one) if budget >= one else 1
        assert chunks.size <= max(1, budget // one // 8) <= most + 1
        assert keep or chunks.kept == 0
        rest = rows - chunks.kept
        if rest:
            parts = math.ceil(rest / chunks.size)
            assert parts == math.ceil(rest / max(1, budget // one // 8)), "no more chunks than the bound asks for"
            assert parts * chunks.size - rest < parts, "the last chunk is shorter by less than one row a chunk"


def test_the_parts_are_all_rows_in_order() -> None:
    for chunks in (HeadChunks(0, 1), HeadChunks(0, 5), HeadChunks(17, 0), HeadChunks(6, 4), HeadChunks(30, 0)):
        parts = chunks.parts(17)
        assert [row for start, stop in parts for row in range(start, stop)] == list(range(17))
    assert HeadChunks(6, 4).parts(17) == [(0, 6), (6, 10), (10, 14), (14, 17)]
    assert HeadChunks(0, 4).parts(0) == HeadChunks(0, 0).parts(0) == []


def test_the_bytes_of_a_division() -> None:
    assert head_bytes(HeadChunks(6, 4), 57, 2) == 10 * 64 * 2
    assert head_chunks(24, 57, 4, 24 * 64 * 4, keep=True) == HeadChunks(24, 0)
    # Of 23 rows, two are a chunk's.
    assert head_chunks(24, 57, 4, 24 * 64 * 4 - 1, keep=True) == HeadChunks(21, 2)


def test_the_budgets_hold_what_they_are_made_for() -> None:
    assert head_chunks(8192, 128_256, 2, GPU_BUDGET_BYTES, keep=True) == HeadChunks(8192, 0)
    assert head_chunks(4096, 128_256, 4, CPU_BUDGET_BYTES, keep=True) == HeadChunks(4096, 0)
