"""Pairs of random tokens for packs, without a data set on disk."""

from collections.abc import Sequence

import numpy as np

from dpo_testing.models import VOCABULARY
from dpo_trainer.data.packs.collate import TokenIds, make_pack
from dpo_trainer.model.pack import Pack

LENGTHS = ((17, 9, 14), (3, 21, 1), (26, 1, 12), (1, 6, 5))
"""(prompt, chosen, rejected) tokens of each pair."""


class Pairs:
    """Pair i has the lengths of row i, and tokens that depend on i only."""

    def __init__(self, lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> None:
        self.lengths = lengths

    def tokens(self, pair: int) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Token ids of prompt, chosen and rejected."""
        draw = np.random.default_rng(pair)
        prompt, chosen, rejected = (
            draw.integers(3, VOCABULARY, size=length).astype(np.int32) for length in self.lengths[pair]
        )
        return prompt, chosen, rejected


def pack_of(*pairs: int, share: bool = True, with_rejected: bool = True, multiple: int = 16) -> Pack:
    """The pack of these pairs, padded to a multiple."""
    pack = make_pack(Pairs(), pairs, share=share, with_rejected=with_rejected, pad_to_multiple=multiple)
    pack.validate()
    return pack
