"""Builds a Pack from pairs: token stream, positions, segments, and the rows that predict response tokens."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_trainer.model.pack import Pack, Segment

TokenIds = NDArray[np.int32]
"""[n] int32 token ids."""

FILLER_PAIR = -1
"""The dataset index of a filler pair, which goes through the model with weight zero so that collectives match."""


class PairTokens(Protocol):
    """The source of a pack's tokens, such as a PairIndex."""

    def tokens(self, pair: int) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Return the token ids of the pair's prompt, chosen and rejected text. Only rejected may be empty."""


class _Stream:
    """Accumulates one pack. All arrays are numpy until the end: tensors would dominate the cost of small pairs."""

    def __init__(self) -> None:
        self.length = 0
        self.tokens: list[NDArray[np.int32]] = []
        self.positions: list[NDArray[np.int64]] = []
        self.origins: list[NDArray[np.int64]] = []
        self.segments: list[Segment] = []
        self.rows: list[NDArray[np.int64]] = []
        self.labels: list[NDArray[np.int32]] = []
        self.owners: list[NDArray[np.int64]] = []

    def segment(self, pieces: dict[int, TokenIds], first_position: int, parent: int | None) -> int:
        """Append the pieces, each under its origin, as one segment and return where it starts."""
        start = self.length
        self.tokens.extend(pieces.values())
        self.origins.extend(np.full(len(piece), origin, dtype=np.int64) for origin, piece in pieces.items())
        self.length += sum(len(piece) for piece in pieces.values())
        size = self.length - start
        self.positions.append(np.arange(first_position, first_position + size, dtype=np.int64))
        self.segments.append(Segment(start, self.length, parent))
        return start

    def predict(self, response: TokenIds, first_row: int, next_row: int, owner: int) -> None:
        """response[0] is predicted from ``first_row``; response[j ≥ 1] from response[j−1]'s row, next_row + j − 1."""
        rows = np.arange(next_row - 1, next_row - 1 + len(response), dtype=np.int64)
        rows[0] = first_row
        self.rows.append(rows)
        self.labels.append(response)
        self.owners.append(np.full(len(response), owner, dtype=np.int64))


def _add_shared(stream: _Stream, pair: int, prompt: TokenIds, responses: Sequence[TokenIds], owner: int) -> None:
    """Add the prompt once, then each response as its child. Both continue its positions; neither sees the other."""
    last = stream.segment({3 * pair: prompt}, 0, None) + len(prompt) - 1
    parent = len(stream.segments) - 1
    for side, response in enumerate(responses):
        start = stream.segment({3 * pair + 1 + side: response}, len(prompt), parent)
        stream.predict(response, last, start, owner + side)


def _add_unshared(stream: _Stream, pair: int, prompt: TokenIds, responses: Sequence[TokenIds], owner: int) -> None:
    """Add the prompt and a response as one segment, for each response."""
    for side, response in enumerate(responses):
        start = stream.segment({3 * pair: prompt, 3 * pair + 1 + side: response}, 0, None) + len(prompt)
        stream.predict(response, start - 1, start, owner + side)


def _filler() -> tuple[TokenIds, TokenIds, TokenIds]:
    token = np.zeros(1, dtype=np.int32)  # id 0 exists in every vocabulary
    return token, token, token


def _cat(
    parts: Sequence[NDArray[np.int32]] | Sequence[NDArray[np.int64]], pad: int = 0, value: int = 0
) -> torch.Tensor:
    flat = np.concatenate([*parts, np.full(pad, value, dtype=np.int64)])
    return torch.from_numpy(flat.astype(np.int64, copy=False))


def make_pack(
    index: PairTokens, pair_ids: Sequence[int], *, share: bool, pad_to_multiple: int = 1, with_rejected: bool = True
) -> Pack:
    """Build the pack of these pairs (dataset indices, in this order). No pairs: a filler pack of one tiny pair.

    ``share``: a pair's prompt appears once, with both responses as its children; otherwise before each response.
    ``with_rejected=False`` (SFT alone) leaves out the rejected responses. The end of the stream is padded to a multiple
    of ``pad_to_multiple``. Rows and owners are ordered by pair, chosen before rejected.
    """
    stream = _Stream()
    ids = [int(pair) for pair in pair_ids] or [FILLER_PAIR]
    common: list[int] = []
    for number, pair in enumerate(ids):
        prompt, chosen, rejected = index.tokens(pair) if pair != FILLER_PAIR else _filler()
        common.append(len(prompt) - 1 + min(len(chosen), len(rejected)))
        if with_rejected:
            add = _add_shared if share else _add_unshared
            add(stream, pair, prompt, (chosen, rejected), 2 * number)
        else:  # nothing to share: one segment is one causal call
            _add_unshared(stream, pair, prompt, (chosen,), 2 * number)
    pad = -stream.length % pad_to_multiple
    return Pack(
        tokens=_cat(stream.tokens, pad),
        position_ids=_cat(stream.positions, pad),
        origins=_cat(stream.origins, pad, value=-1),
        segments=tuple(stream.segments),
        rows=_cat(stream.rows),
        labels=_cat(stream.labels),
        owners=_cat(stream.owners),
        pairs=torch.tensor(ids, dtype=torch.int64),
        common=torch.tensor(common, dtype=torch.int64) if with_rejected else None,
    )
