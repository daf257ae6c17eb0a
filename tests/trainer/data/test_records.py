"""Every form that a line may have, and every way in which it can be unusable."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.spec import Columns
from dpo_testing.corpora import parse_line
from dpo_trainer.data.problems import Problem, Reason
from dpo_trainer.data.reading.records import Record

USUAL = Columns()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parse(row: Any, columns: Columns = USUAL, *, rejected_needed: bool = True) -> Record | Problem:
    return parse_line(json.dumps(row).encode(), columns, rejected_needed=rejected_needed)


PAIR = ([user("q")], [reply("good")], [reply("bad")])

FORMS: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "strings": ({"prompt": "q", "chosen_response": "good", "rejected_response": "bad"}, ("q", "good", "bad")),
    "short names": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ("q", "good", "bad")),
    "long names win": (
        {"prompt": "q", "chosen": "x", "chosen_response": "good", "rejected": "y", "rejected_response": "bad"},
        ("q", "good", "bad"),
    ),
    "an empty prompt is text": ({"prompt": "", "chosen": "good", "rejected": "bad"}, ("", "good", "bad")),
    "message lists": ({"prompt": PAIR[0], "chosen": PAIR[1], "rejected": PAIR[2]}, PAIR),
    "string prompt": ({"prompt": "q", "chosen": PAIR[1], "rejected": PAIR[2]}, PAIR),
    "string responses": ({"prompt": PAIR[0], "chosen": "good", "rejected": "bad"}, PAIR),
    "prompt repeated": (
        {"prompt": PAIR[0], "chosen": PAIR[0] + PAIR[1], "rejected": PAIR[0] + PAIR[2]},
        PAIR,
    ),
    "conversations": ({"chosen": PAIR[0] + PAIR[1], "rejected": PAIR[0] + PAIR[2]}, PAIR),
    "conversations, null prompt": (
        {"prompt": None, "chosen": PAIR[0] + PAIR[1], "rejected": PAIR[0] + PAIR[2]},
        PAIR,
    ),
    "conversations beside their first message as a string": (
        {"prompt": "q", "chosen": PAIR[0] + PAIR[1], "rejected": PAIR[0] + PAIR[2]},
        PAIR,
    ),
    "longer conversations split at the last common message": (
        {
            "chosen": [user("a"), reply("b"), user("c"), reply("good")],
            "rejected": [user("a"), reply("b"), user("c"), reply("bad")],
        },
        ([user("a"), reply("b"), user("c")], [reply("good")], [reply("bad")]),
    ),
    "responses of several turns": (
        {"chosen": [user("a"), reply("x")], "rejected": [user("a"), reply("y"), user("z"), reply("w")]},
        ([user("a")], [reply("x")], [reply("y"), user("z"), reply("w")]),
    ),
    "equal conversations keep a response": (
        {"chosen": [user("a"), reply("x")], "rejected": [user("a"), reply("x")]},
        ([user("a")], [reply("x")], [reply("x")]),
    ),
    "content in parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "go"}, "od"]}],
            "rejected": PAIR[2],
        },
        PAIR,
    ),
    "unknown keys are not looked at": (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "score": [1], "id": None},
        ("q", "good", "bad"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    row, (prompt, chosen, rejected) = FORMS[form]
    assert parse(row) == Record(prompt, chosen, rejected)


def test_named_columns() -> None:
    columns = Columns(prompt="q", chosen="a", rejected="b", chosen_reward="ra", rejected_reward="rb")
    row = {"q": "1", "a": "2", "b": "3", "ra": 4, "rb": -0.5, "prompt": "no", "chosen": "no", "rejected_reward": 9}
    assert parse(row, columns) == Record("1", "2", "3", 4.0, -0.5)


def test_rewards_are_optional_one_by_one() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert parse(row | {"chosen_reward": 2}) == Record("q", "good", "bad", 2.0, None)
    assert parse(row | {"chosen_reward": None, "rejected_reward": 0}) == Record("q", "good", "bad", None, 0.0)


def test_sft_alone_needs_and_reads_no_rejected_response() -> None:
    assert parse({"prompt": "q", "chosen": "a"}, rejected_needed=False) == Record("q", "a", None)
    broken = {"prompt": "q", "chosen": "a", "rejected": 7, "rejected_reward": "x"}
    assert parse(broken, rejected_needed=False) == Record("q", "a", None)
    talk = {"chosen": [user("a"), reply("b"), user("c"), reply("d")]}
    assert parse(talk, rejected_needed=False) == Record([user("a"), reply("b"), user("c")], [reply("d")], None)
    assert parse({"prompt": [user("q")], "chosen": "a"}, rejected_needed=False) == Record(
        [user("q")], [reply("a")], None
    )


GOOD = {"prompt": "q", "chosen": "good", "rejected": "bad"}
UNUSABLE: list[tuple[bytes | dict[str, Any], Reason, str]] = [
    (b'{"prompt": "q", "chosen": ', Reason.BROKEN_JSON, "column"),
    (b'{"prompt": "q', Reason.BROKEN_JSON, "Unterminated string starting at column 12"),
    (b'{"prompt": "q\xff"}', Reason.BROKEN_JSON, "UTF-8"),
    (b'{"chosen_reward": NaN}', Reason.BROKEN_JSON, "NaN"),
    (b'{"chosen_reward": -Infinity}', Reason.BROKEN_JSON, "Infinity"),
    (b"[" * 100_000, Reason.BROKEN_JSON, "nested too deeply"),
    (b'{"x": ' + b"9" * 5000 + b"}", Reason.BROKEN_JSON, "digits"),
    (b"[1]", Reason.NOT_AN_OBJECT, "a list"),
    (b'"text"', Reason.NOT_AN_OBJECT, "a string"),
    (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', Reason.BAD_TEXT, "surrogate"),
    ({"chosen": "good", "rejected": "bad"}, Reason.MISSING_KEY, '"prompt"'),
    ({"prompt": "q", "rejected": "bad"}, Reason.MISSING_KEY, '"chosen_response" or "chosen"'),
    ({"prompt": "q", "chosen": "good"}, Reason.MISSING_KEY, "spec.data.columns.rejected"),
    ({"prompt": "q", "chosen": "good", "rejected": None}, Reason.MISSING_KEY, '"rejected_response" or "rejected"'),
    (GOOD | {"prompt": 3}, Reason.WRONG_TYPE, '"prompt" is a number'),
    (GOOD | {"chosen": {"text": "a"}}, Reason.WRONG_TYPE, '"chosen" is an object'),
    (GOOD | {"chosen": [reply("a")]}, Reason.WRONG_TYPE, "one response is a string"),
    (GOOD | {"prompt": ["q"]}, Reason.BAD_MESSAGE, '"prompt"[0]'),
    (GOOD | {"prompt": [{"from": "human", "value": "q"}]}, Reason.BAD_MESSAGE, '"from"'),
    (GOOD | {"prompt": [{"role": "user", "content": 5}]}, Reason.BAD_MESSAGE, "a number"),
    (GOOD | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, Reason.BAD_MESSAGE, "not text"),
    (GOOD | {"chosen_reward": "1"}, Reason.BAD_REWARD, '"chosen_reward" is a string'),
    (GOOD | {"rejected_reward": True}, Reason.BAD_REWARD, "true or false"),
    (
        b'{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 1e999}',
        Reason.BAD_REWARD,
        "is inf, not a finite number",
    ),
    (GOOD | {"chosen": ""}, Reason.EMPTY_RESPONSE, "chosen"),
    (GOOD | {"rejected": ""}, Reason.EMPTY_RESPONSE, "rejected"),
    ({"prompt": [user("q")], "chosen": [reply("")], "rejected": [reply("b")]}, Reason.EMPTY_RESPONSE, "chosen"),
    ({"prompt": [user("q")], "chosen": "", "rejected": "b"}, Reason.EMPTY_RESPONSE, "chosen"),
    ({"prompt": [user("q")], "chosen": [], "rejected": [reply("b")]}, Reason.EMPTY_RESPONSE, "chosen"),
    ({"prompt": [], "chosen": [reply("a")], "rejected": [reply("b")]}, Reason.EMPTY_PROMPT, "no message"),
    (
        {"chosen": [user("x"), reply("a")], "rejected": [user("y"), reply("b")]},
        Reason.NO_COMMON_PROMPT,
        "no first message",
    ),
    (
        {
            "chosen": [user("x"), reply("a"), user("n"), reply("a")],
            "rejected": [user("x"), reply("a"), user("m"), reply("b")],
        },
        Reason.NO_COMMON_PROMPT,
        'role "user"',
    ),
]


@pytest.mark.parametrize(("row", "reason", "words"), UNUSABLE)
def test_unusable_lines_say_why(row: bytes | dict[str, Any], reason: Reason, words: str) -> None:
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    problem = parse_line(line, USUAL)
    assert isinstance(problem, Problem)
    assert problem.reason is reason
    assert words in problem.message
    assert "\n" not in problem.message


def test_a_column_that_was_asked_for_must_be_there() -> None:
    problem = parse(GOOD, Columns(chosen_reward="score"))
    assert isinstance(problem, Problem)
    assert problem.reason is Reason.MISSING_KEY
    problem = parse({"chosen": [user("a"), reply("b")], "rejected": [user("a"), reply("c")]}, Columns(prompt="p"))
    assert isinstance(problem, Problem)
    assert problem.reason is Reason.MISSING_KEY


def test_a_whole_surrogate_pair_is_a_character() -> None:
    record = parse_line(b'{"prompt": "\\ud83d\\ude42", "chosen": "a", "rejected": "b"}', USUAL)
    assert record == Record("🙂", "a", "b")


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse_line(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), USUAL) == Record("q", "good", "bad")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "user"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "chosen_reward"]), json_values), st.booleans())
def test_no_json_object_crashes_the_parser(row: dict[str, Any], needed: bool) -> None:
    assert isinstance(parse(row, rejected_needed=needed), Record | Problem)


@given(st.binary(max_size=40))
def test_no_bytes_crash_the_parser(line: bytes) -> None:
    assert isinstance(parse_line(line, USUAL), Record | Problem)
