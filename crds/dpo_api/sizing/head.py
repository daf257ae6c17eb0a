"""How the LM head divides a pack's rows: what it keeps for the backward pass, and what it computes a second time.

For its backward pass the head needs a matrix of rows × vocabulary. As many rows as a budget of bytes allows are kept;
the others are computed again, chunk by chunk, which costs one more GEMM for each of them. The trainer divides its rows
with this module, and the memory model counts the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

GPU_BUDGET_BYTES = 2 * 2**30
"""Most bytes of the head's matrices on a GPU: those of 8,192 rows of a vocabulary of 128,256 in bf16 fit."""

CPU_BUDGET_BYTES = 2 * 2**30
"""The same on a CPU: those of 4,096 rows of a vocabulary of 128,256 in fp32 fit. Of 8,192 such rows 55 % are computed
again; with 1 GiB it would be 78 %."""

GPU_BLOCK_BYTES = 32 * 2**20
"""fp32 values that the softmax is computed with at a time: they stay in the L2 cache of a GPU (40 MiB or more)."""

CPU_BLOCK_BYTES = 2 * 2**20
"""The same on a CPU: they stay in its cores' L2 caches from one operation to the next."""

ALIGNMENT = 8
"""Each row of a matrix begins at a multiple of this many values: GEMMs are slow on rows that begin at odd addresses."""


@dataclass(frozen=True)
class HeadChunks:
    """A division of rows: the first ``kept`` rows in one piece that is kept, the others ``size`` at a time."""

    kept: int
    size: int

    def parts(self, rows: int) -> list[tuple[int, int]]:
        """Return the first row of each part, and the row after its last."""
        kept = [(0, min(self.kept, rows))] if self.kept else []
        return kept + [(start, min(start + self.size, rows)) for start in range(self.kept, rows, max(1, self.size))]


def row_bytes(columns: int, value: int) -> int:
    """Bytes of one row of a matrix of ``columns`` values of ``value`` bytes each."""
    return value * ALIGNMENT * -(-columns // ALIGNMENT)


def head_chunks(rows: int, columns: int, value: int, budget: int, *, keep: bool) -> HeadChunks:
    """Divide rows so that their matrices take at most ``budget`` bytes, or one row if that takes more.

    columns: this rank's part of the vocabulary. value: bytes of a value of the computation. keep: whether backward
    needs the matrix, which it does if the head is trained. If all rows fit, all are kept. If not, the budget holds one
    chunk of an eighth of it, and kept rows in the rest. Chunks have equal sizes, because the GEMMs of a small last
    chunk would be inefficient.
    """
    fitting = budget // row_bytes(columns, value)
    if keep and rows <= fitting:
        return HeadChunks(kept=rows, size=0)
    most = max(1, fitting // 8)
    kept = max(0, fitting - most) if keep else 0
    chunks = max(1, -(-(rows - kept) // most))
    return HeadChunks(kept, -(-(rows - kept) // chunks))


def head_bytes(chunks: HeadChunks, columns: int, value: int) -> int:
    """Bytes of the matrices that exist at a time: the kept rows' and one chunk's."""
    return row_bytes(columns, value) * (chunks.kept + chunks.size)
