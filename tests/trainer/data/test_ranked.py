"""Ranked lists and preference scores: which pairs they give, with which rewards, and what is wrong with a row."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.errors import InvalidDataError
from dpo_api.spec import Data
from dpo_store import open_store
from dpo_testing.corpora import byte_bpe_tokenizer, write_jsonl
from dpo_trainer.data.index.build import Source, build_index
from dpo_trainer.data.index.spill import PairIndex
from dpo_trainer.data.problems import Problem, Reason
from dpo_trainer.data.reading.ranked import names_read, records_of
from dpo_trainer.data.reading.records import Record
from dpo_trainer.data.tokens.tokenizer import load_tokenizer


def data_of(**settings: Any) -> Data:
    return Data.model_validate({"train": [{"uri": "x"}], **settings})


def pairs_of(row: dict[str, Any], *, rejected_needed: bool = True, **settings: Any) -> list[tuple[Any, ...]]:
    found = records_of(row, data_of(**settings), rejected_needed=rejected_needed)
    assert isinstance(found, list), found
    assert all(record.prompt == "q" or isinstance(record.prompt, list) for record in found)
    return [(record.chosen, record.rejected, record.chosen_reward, record.rejected_reward) for record in found]


def problem(row: dict[str, Any], **settings: Any) -> Problem:
    found = records_of(row, data_of(**settings))
    assert isinstance(found, Problem), found
    return found


FOUR = {"prompt": "q", "completions": ["a", "b", "c", "d"], "scores": [2, 5.5, 2, -1]}


def test_scores_give_the_pairs_of_the_policy_and_become_rewards() -> None:
    assert pairs_of(FOUR) == [("b", "d", 5.5, -1.0)]
    assert pairs_of(FOUR, pairs="adjacent") == [("b", "a", 5.5, 2.0), ("c", "d", 2.0, -1.0)]  # a and c are equal
    assert pairs_of(FOUR, pairs="all") == [
        ("b", "a", 5.5, 2.0),
        ("b", "c", 5.5, 2.0),
        ("b", "d", 5.5, -1.0),
        ("a", "d", 2.0, -1.0),
        ("c", "d", 2.0, -1.0),
    ]


def test_ranks_count_from_the_best_and_give_no_rewards() -> None:
    row = {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [3, 1, 2], "chosen_reward": 7}
    assert pairs_of(row) == [("b", "a", None, None)]
    assert pairs_of(row, pairs="adjacent") == [("b", "c", None, None), ("c", "a", None, None)]
    both = {**row, "scores": [9, 1, 2]}
    assert pairs_of(both) == [("a", "b", 9.0, 1.0)], "scores say more"
    assert pairs_of(both, columns={"ranks": "ranks"}) == [("b", "a", None, None)]


def test_sft_alone_takes_the_best() -> None:
    for policy in ("bestWorst", "all"):
        assert pairs_of(FOUR, rejected_needed=False, pairs=policy) == [("b", None, 5.5, None)]
    one = {"prompt": "q", "completions": ["a"], "scores": [1]}
    assert pairs_of(one, rejected_needed=False) == [("a", None, 1.0, None)]


def test_lists_of_structs_are_read_by_paths() -> None:
    row = {"prompt": "q", "answers": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}]}
    columns = {"completions": "answers[].text", "ranks": "answers[].rank"}
    assert pairs_of(row, columns=columns) == [("b", "a", None, None)]
    wrong = {"prompt": "q", "answers": [{"text": 7, "rank": 2}, {"text": "b", "rank": 1}]}
    assert '"answers[].text[0]" is a number, expected a string' in problem(wrong, columns=columns).message


def test_completions_may_be_messages() -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    row = {"prompt": [{"role": "user", "content": "q"}], "completions": [said("a"), said("b")], "scores": [1, 2]}
    assert pairs_of(row) == [(said("b"), said("a"), 2.0, 1.0)]


def test_a_pair_in_the_row_comes_first() -> None:
    row = {**FOUR, "chosen": "x", "rejected": "y", "overall_preference": 2}
    assert pairs_of(row) == [("x", "y", None, None)]
    assert pairs_of(row, columns={"completions": "completions"}) == [("b", "d", 5.5, -1.0)]


HELPSTEER = {"context": [{"role": "user", "content": "q"}], "response1": "one", "response2": "two"}


@pytest.mark.parametrize(("score", "chosen", "rejected"), [(-3, "one", "two"), (-1, "one", "two"), (2.5, "two", "one")])
def test_a_preference_score_chooses_between_two_responses(score: float, chosen: str, rejected: str) -> None:
    row = {**HELPSTEER, "overall_preference": score}
    (found,) = pairs_of(row)
    assert [side[0]["content"] for side in found[:2]] == [chosen, rejected]
    assert found[2:] == (None, None)
    (found,) = pairs_of(row, preferenceMargin=True)
    assert found[2:] == (abs(score), 0.0)
    (found,) = pairs_of(row, rejected_needed=False)
    assert found[1] is None
    older = {"prompt": "q", "response_1": "one", "response_2": "two", "preference_strength": score}
    assert pairs_of(older) == [(chosen, rejected, None, None)]
    named = {"prompt": "q", "x": {"left": "one", "right": "two"}, "p": score}
    columns = {"preference": "p", "response1": "x.left", "response2": "x.right"}
    assert pairs_of(named, columns=columns) == [(chosen, rejected, None, None)]


WRONG: list[tuple[dict[str, Any], Reason, str]] = [
    ({"scores": [1, 1, 1, 1]}, Reason.TIE, '"scores" ranks no completion above another, so that there is no pair'),
    ({"completions": ["a"], "scores": [1]}, Reason.TIE, "no pair"),
    ({"scores": [1, 2]}, Reason.BAD_RANKING, '"scores" has 2 elements, and "completions" has 4'),
    ({"completions": [], "scores": []}, Reason.BAD_RANKING, '"scores" has 0 elements, and "completions" has 0'),
    ({"scores": [1, 2, None, 3]}, Reason.BAD_RANKING, '"scores"[2] is null, expected a number'),
    ({"scores": [1, 2, True, 3]}, Reason.BAD_RANKING, '"scores"[2] is true or false, expected a number'),
    ({"scores": [1, 2, float("nan"), 3]}, Reason.BAD_RANKING, '"scores"[2] is nan, not a finite number'),
    ({"scores": [1, 2, 10**400, 3]}, Reason.BAD_RANKING, '"scores"[2] is too large for a number'),
    ({"scores": 3}, Reason.BAD_RANKING, '"scores" is a number, expected a list of numbers'),
    ({"scores": None}, Reason.MISSING_KEY, 'no "scores" (keys here: "prompt", "completions", "scores")'),
    ({"completions": "abcd"}, Reason.WRONG_TYPE, '"completions" is a string, expected a list of completions'),
    ({"completions": ["a", None, "c", "d"]}, Reason.WRONG_TYPE, '"completions"[1] is null'),
    ({"completions": ["a"] * 65, "scores": [1] * 65}, Reason.BAD_RANKING, "has 65 completions, more than 64"),
    ({"completions": ["a", "", "c", "d"]}, Reason.EMPTY_RESPONSE, "the chosen response is empty"),
    ({"prompt": None}, Reason.MISSING_KEY, 'no "prompt"'),
]


@pytest.mark.parametrize(("change", "reason", "message"), WRONG)
def test_a_list_that_gives_no_pair_says_why(change: dict[str, Any], reason: Reason, message: str) -> None:
    found = problem({**FOUR, **change})
    assert found.reason is reason
    assert message in found.message


def test_a_comparison_that_gives_no_pair_says_why() -> None:
    assert problem({**HELPSTEER, "overall_preference": 0}) == Problem(
        Reason.TIE, '"overall_preference" is 0, so that there is no pair'
    )
    assert problem({**HELPSTEER, "overall_preference": "2"}).reason is Reason.BAD_RANKING
    assert 'no "response2"' in problem({**HELPSTEER, "response2": None, "overall_preference": 1}).message
    assert 'no "context"' in problem({**HELPSTEER, "context": None, "overall_preference": 1}).message


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=7),
    st.sampled_from(["bestWorst", "adjacent", "all"]),
    st.booleans(),
)
def test_the_better_one_is_chosen_in_every_pair(values: list[int], policy: str, ranks: bool) -> None:
    row = {"prompt": "q", "completions": [f"r{n}" for n in range(len(values))], "ranks" if ranks else "scores": values}
    found = records_of(row, data_of(pairs=policy))
    if isinstance(found, Problem):
        assert found.reason is Reason.TIE
        assert len(set(values)) == 1
        return
    worth = {f"r{n}": -value if ranks else value for n, value in enumerate(values)}
    sides = [(str(record.chosen), str(record.rejected)) for record in found]
    assert all(worth[better] > worth[worse] for better, worse in sides)
    assert len(set(sides)) == len(sides)
    if policy == "all":
        assert len(sides) == sum(a > b for a in worth.values() for b in worth.values())
    if policy == "adjacent":
        assert len(sides) == len(set(values)) - 1
    if policy == "bestWorst":
        assert [(worth[a], worth[b]) for a, b in sides] == [(max(worth.values()), min(worth.values()))]


def build(path: Path, tmp_path: Path, **settings: Any) -> PairIndex:
    tokenizer = load_tokenizer(byte_bpe_tokenizer(tmp_path / "tokenizer"))
    source = Source("train-0", str(path), open_store())
    return build_index("train", [source], tokenizer, data_of(boundary="separate", **settings), cache=tmp_path / "cache")


def test_an_index_of_lists_counts_lines_and_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "q\n", "completions": ["the a", "of to", "is was"], "scores": [n, 2, 7]} for n in (1, 2, 3)] + [
        {"prompt": "q\n", "completions": ["the a", "of to"], "scores": [4, 4]}
    ]
    index = build(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, pairs="all")
    assert (index.n, index.stats["lines"], index.stats["dropped"]) == (3 + 2 + 3, 4, {"tie": 1})
    assert [index.origin(n).rpartition(":")[2] for n in range(index.n)] == list("11122333")
    assert index.rewards([0, 1, 2], 0.0, 0.0).tolist() == [[7, 2], [7, 1], [2, 1]]
    assert "1 of 9 pairs of the train data were dropped (tie 1)" in index.stats["warnings"][0]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    same = build(tmp_path / "a.parquet", tmp_path, pairs="all")
    assert (same.fingerprint, same.rewards_fingerprint) == (index.fingerprint, index.rewards_fingerprint)
    assert build(tmp_path / "a.jsonl", tmp_path).n == 3


def test_a_list_that_fails_twice_is_one_line(tmp_path: Path) -> None:
    rows = [{"prompt": "q\n", "completions": ["the " * 40, "of to", "is was"], "scores": [1, 2, 3]}] * 2
    with pytest.raises(InvalidDataError, match="2 of 2 lines of the train data cannot be used") as caught:
        build(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, pairs="all", maxLength=20, overLength="error")
    assert str(caught.value).count("a.jsonl:1: ") == 2


def test_only_the_columns_that_may_be_read_are_named() -> None:
    assert names_read(data_of().columns) >= {
        "prompt",
        "chosen",
        "completions",
        "scores",
        "ranks",
        "context",
        "response_1",
    }
    columns = data_of(columns={"completions": "answers[].text", "scores": "s"}).columns
    assert names_read(columns) >= {"answers", "s"}
    assert not names_read(columns) & {"completions", "scores"}


def test_a_row_of_json_gives_plain_records() -> None:
    (found,) = records_of(json.loads('{"prompt": "q", "chosen": "a", "rejected": "b"}'), data_of())  # type: ignore[misc]
    assert found == Record("q", "a", "b")
