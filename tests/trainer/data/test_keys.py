"""Paths into nested values."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.spec import Columns, Data
from dpo_store import open_store
from dpo_testing.corpora import byte_bpe_tokenizer, write_jsonl
from dpo_trainer.data.index.build import Source, build_index
from dpo_trainer.data.problems import Problem, Reason
from dpo_trainer.data.reading.keys import root_of, steps_of, value_at
from dpo_trainer.data.reading.records import Record, record_of
from dpo_trainer.data.tokens.tokenizer import load_tokenizer

ROW: dict[str, Any] = {
    "a": {"b": ["x", "y"], "c": [[1, 2], [3]], "d.e": 5},
    "a.b": "literal",
    "list": [{"t": 1, "s": None}, {"t": 2}],
    "text": "hello",
    "none": None,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", "hello"),
        ("a.b", "literal"),  # a key of this very name comes first
        ("a.b[0]", "x"),
        ("a.b[-1]", "y"),
        ("a.b[2]", None),
        ("a.b[-3]", None),
        ("a.c[1][0]", 3),
        ("a.c[0][1]", 2),
        ("list[].t", [1, 2]),
        ("list[].s", [None, None]),
        ("list[1].t", 2),
        ("list.t", None),
        ("text.x", None),
        ("text[0]", None),  # of a string there are no elements
        ("none.x", None),
        ("absent.x", None),
        ("a.c[]", [[1, 2], [3]]),
        ("text[]", None),
    ],
)
def test_a_path_leads_to_its_value(name: str, value: Any) -> None:
    assert value_at(ROW, name) == value


@pytest.mark.parametrize("name", ["a", "", ".", "a.", ".a", "a..b", "a[", "a[x]", "a[0]b", "[0]", "a[-]", "a]"])
def test_what_is_no_path_is_only_a_key(name: str) -> None:
    assert steps_of(name) is None
    assert root_of(name) == name
    assert value_at({name: 3}, name) == 3


@given(st.text(max_size=12))
def test_no_text_breaks_the_lookup(name: str) -> None:
    value_at(ROW, name)
    root_of(name)


def problem(row: dict[str, Any], **columns: str) -> Problem:
    found = record_of(row, Columns.model_validate(columns))
    assert isinstance(found, Problem)
    return found


def test_records_are_read_by_paths_and_say_where_one_ends() -> None:
    row = {"in": {"q": "why"}, "out": [{"text": "good", "r": 2}, {"text": "bad", "r": 1.5}]}
    columns = {"prompt": "in.q", "chosen": "out[0].text", "rejected": "out[-1].text"}
    rewards = {"chosenReward": "out[0].r", "rejectedReward": "out[1].r"}
    found = record_of(row, Columns.model_validate({**columns, **rewards}))
    assert found == Record("why", "good", "bad", 2.0, 1.5)

    def said(**other: str) -> str:
        missing = problem(row, **{**columns, **other})
        assert missing.reason is Reason.MISSING_KEY
        return missing.message

    assert said(rejected="out[2].text").startswith(
        'no "out[2].text" ("out" has 2 elements); spec.data.columns.rejected'
    )
    assert 'no "in.x" ("in" is an object, with the keys "q")' in said(prompt="in.x")
    assert 'no "in.q.x" ("in.q" is a string)' in said(prompt="in.q.x")
    assert 'no "out[0].text[]" ("out[0].text" is a string, not a list)' in said(chosen="out[0].text[]")
    assert 'no "inn.q" (keys here: "in", "out")' in said(prompt="inn.q")
    wrong = problem(row, **{**columns, "prompt": "out[0].r"})
    assert wrong.message == '"out[0].r" is a number, expected a string or a list of messages'


def test_a_table_is_read_by_the_same_paths(tmp_path: Path) -> None:
    rows = [
        {"conv": {"turns": [f"question {n}\n", f"good {n}\n"]}, "bad.text": f"no {n}\n", "meta": {"unused": n}}
        for n in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "conv.turns[0]", "chosen": "conv.turns[1]", "rejected": "bad.text"}
    tokenizer = load_tokenizer(byte_bpe_tokenizer(tmp_path / "tokenizer"))
    prints = []
    for name in ("a.parquet", "a.jsonl"):
        data = Data.model_validate({"train": [{"uri": name}], "columns": columns})
        source = Source("train-0", f"{tmp_path}/{name}", open_store())
        prints.append(build_index("train", [source], tokenizer, data, cache=tmp_path / "cache"))
    assert prints[0].n == 9
    assert prints[0].fingerprint == prints[1].fingerprint
