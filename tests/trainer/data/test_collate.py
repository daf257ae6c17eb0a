"""A pack against a slow construction that shares no code with it: one token at a time, from the definition."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_trainer.data.packs.collate import FILLER_PAIR, TokenIds, make_pack
from dpo_trainer.data.packs.packing import pair_cost
from dpo_trainer.model.pack import Pack

ids = st.lists(st.integers(0, 999), min_size=1, max_size=7)
pair_lists = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=5)
Text = list[int]


@dataclass
class Pairs:
    """Pairs in memory."""

    rows: list[tuple[Text, Text, Text]]

    def tokens(self, pair: int) -> tuple[TokenIds, TokenIds, TokenIds]:
        prompt, chosen, rejected = (np.array(part, dtype=np.int32) for part in self.rows[pair])
        return prompt, chosen, rejected


def seen_by(pack: Pack, row: int) -> list[tuple[int, int]]:
    """(token, position) of everything that the token at `row` may attend to, itself included, in stream order."""
    for segment in pack.segments:
        if segment.start <= row < segment.end:
            allowed = list(range(segment.start, row + 1))
            if segment.parent is not None:
                parent = pack.segments[segment.parent]
                allowed = list(range(parent.start, parent.end)) + allowed
            return [(int(pack.tokens[i]), int(pack.position_ids[i])) for i in allowed]
    raise AssertionError(f"row {row} belongs to no segment")


def predictions(pack: Pack) -> list[tuple[int, list[tuple[int, int]], int]]:
    """(owner, context, label) of each row: all that the log-probability of a response token depends on."""
    triples = zip(pack.rows.tolist(), pack.labels.tolist(), pack.owners.tolist(), strict=True)
    return [(owner, seen_by(pack, row), label) for row, label, owner in triples]


def expected(rows: list[tuple[Text, Text, Text]], with_rejected: bool) -> list[tuple[int, list[tuple[int, int]], int]]:
    """From the definition: token j of a response is predicted from prompt + response[:j], at positions 0, 1, 2, …"""
    result = []
    for number, (prompt, chosen, rejected) in enumerate(rows):
        for side, response in enumerate((chosen, rejected) if with_rejected else (chosen,)):
            for j, label in enumerate(response):
                context = prompt + response[:j]
                result.append((2 * number + side, [(token, at) for at, token in enumerate(context)], label))
    return result


@given(pair_lists, st.booleans(), st.booleans(), st.integers(1, 16))
def test_every_row_sees_its_own_prompt_and_the_response_so_far(
    rows: list[tuple[Text, Text, Text]], share: bool, with_rejected: bool, multiple: int
) -> None:
    pack = make_pack(Pairs(rows), range(len(rows)), share=share, pad_to_multiple=multiple, with_rejected=with_rejected)
    pack.validate()
    assert predictions(pack) == expected(rows, with_rejected)
    lengths = [(len(prompt), len(chosen), len(rejected) if with_rejected else 0) for prompt, chosen, rejected in rows]
    assert pack.used == sum(pair_cost(*three, share=share) for three in lengths)
    assert pack.length % multiple == 0
    assert pack.length - pack.used < multiple
    assert pack.pairs.tolist() == list(range(len(rows)))


def test_a_shared_pair_by_hand() -> None:
    pack = make_pack(Pairs([([9, 9], [9], [9]), ([1, 2, 3], [4, 5], [6, 7, 8])]), [1], share=True, pad_to_multiple=4)
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert [(s.start, s.end, s.parent) for s in pack.segments] == [(0, 3, None), (3, 5, 0), (5, 8, 0)]
    assert pack.rows.tolist() == [2, 3, 2, 5, 6]
    assert pack.labels.tolist() == [4, 5, 6, 7, 8]
    assert pack.owners.tolist() == [0, 0, 1, 1, 1]
    assert pack.pairs.tolist() == [1]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("with_rejected", [True, False])
def test_a_filler_is_a_whole_pair_of_no_weight(share: bool, with_rejected: bool) -> None:
    pack = make_pack(Pairs([]), [], share=share, pad_to_multiple=8, with_rejected=with_rejected)
    pack.validate()
    assert pack.pairs.tolist() == [FILLER_PAIR]
    assert pack.owners.tolist() == ([0, 1] if with_rejected else [0])
    assert pack.length == 8
    assert len(pack.rows) == len(pack.owners)


def test_padding_belongs_to_no_segment_and_no_row() -> None:
    pack = make_pack(Pairs([([1], [2], [3])]), [0], share=True, pad_to_multiple=64)
    assert pack.length == 64
    assert pack.segments[-1].end == 3
    assert int(pack.rows.max()) < 3
