"""Tools in the data reach the model as transformers would show them, down to the token ids of the packs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from dpo_api.errors import InvalidDataError
from dpo_api.spec import Data
from dpo_store import open_store
from dpo_testing.corpora import CHATML, byte_bpe_tokenizer, preference_rows, write_jsonl
from dpo_testing.tool_templates import JSON_TEXT, QWEN, TIME, WEATHER, call, rows
from dpo_trainer.data.index.build import Source, build_index
from dpo_trainer.data.index.spill import PairIndex
from dpo_trainer.data.packs.collate import make_pack
from dpo_trainer.data.tokens.tokenizer import fetch_tokenizer, load_tokenizer


def tokenizer_folder(folder: Path, template: str | list[dict[str, str]]) -> Path:
    byte_bpe_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def index_of(tmp_path: Path, template: Any, data: list[dict[str, Any]], **settings: Any) -> PairIndex:
    """The index of these records under a tokenizer with this template."""
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "tokenizer", template))
    path = write_jsonl(tmp_path / "train.jsonl", data)
    section = Data.model_validate({"train": [{"uri": str(path)}], **settings})
    return build_index(
        "train", [Source("train", str(path), open_store())], tokenizer, section, cache=tmp_path / "cache"
    )


def refusal(tmp_path: Path, template: Any, row: dict[str, Any]) -> str:
    with pytest.raises(InvalidDataError) as caught:
        index_of(tmp_path, template, [row])
    return str(caught.value)


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with the arguments that transformers expects."""
    text = json.dumps(messages)
    found: list[dict[str, Any]] = json.loads(text)
    for message in found:
        for each in message.get("tool_calls") or []:
            if isinstance(each["function"]["arguments"], str):
                each["function"]["arguments"] = json.loads(each["function"]["arguments"])
    return found


def same_as_transformers(tmp_path: Path, index: PairIndex, data: list[dict[str, Any]]) -> None:
    """Every pair's ids, and the pack of all of them, are those of apply_chat_template on the same folder."""
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    def ids(messages: list[dict[str, Any]], tools: Any, *, generate: bool) -> list[int]:
        found: list[int] = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generate, tokenize=True, return_dict=False
        )
        return found

    expected: list[int] = []
    for number, row in enumerate(data):
        tools = row.get("tools") or None
        tools = json.loads(tools) if isinstance(tools, str) else tools
        tools = tools and [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
        prompt, chosen, rejected = (with_objects(row[key]) for key in ("prompt", "chosen", "rejected"))
        ours = [part.tolist() for part in index.tokens(number)]
        assert ours[0] == ids(prompt, tools, generate=True)
        for side, response in ((1, chosen), (2, rejected)):
            whole = ids(prompt + response, tools, generate=False)
            assert ours[0] + ours[side] == whole
            expected += whole
    pack = make_pack(index, range(len(data)), share=False)
    assert pack.tokens.flatten().tolist() == expected


def test_tools_are_rendered_and_trained_on_as_transformers_renders_them(tmp_path: Path) -> None:
    index = index_of(tmp_path, QWEN, rows())
    assert index.stats["pairs"] == 4
    same_as_transformers(tmp_path, index, rows())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    prompts = [tokenizer.decode(index.tokens(number)[0]) for number in range(4)]
    assert [("get_weather" in text, "get_time" in text) for text in prompts] == [
        (True, True),
        (True, False),
        (True, True),
        (False, False),
    ]


@pytest.mark.parametrize(
    "tools",
    [json.dumps([WEATHER, TIME]), [json.dumps(WEATHER), json.dumps(TIME)], [WEATHER, json.dumps(TIME)]],
    ids=["text", "list of texts", "mixed"],
)
def test_tools_as_json_text_are_the_same_tools(tmp_path: Path, tools: Any) -> None:
    data = [{**rows()[0], "tools": tools}]
    index = index_of(tmp_path, QWEN, data)
    same_as_transformers(tmp_path, index, data)
    same_as_transformers(tmp_path, index, [{**data[0], "tools": [WEATHER, TIME]}])


@pytest.mark.parametrize("tools", [None, [], "", "[]"], ids=repr)
def test_empty_tools_are_no_tools(tmp_path: Path, tools: Any) -> None:
    index = index_of(tmp_path, QWEN, [{**rows()[3], "tools": tools}])
    same_as_transformers(tmp_path, index, [rows()[3]])


def test_arguments_as_json_text_are_not_quoted_again(tmp_path: Path) -> None:
    data = [{**rows()[0], "chosen": [call('{"city": "Paris"}')], "rejected": [call('{"city":"Rome"}')]}]
    index = index_of(tmp_path, QWEN, data)
    same_as_transformers(tmp_path, index, data)
    text = load_tokenizer(tmp_path / "tokenizer").decode(index.tokens(0)[1])
    assert '"arguments": {"city": "Paris"}}' in text


def test_a_template_that_takes_arguments_as_text_gets_them_as_written(tmp_path: Path) -> None:
    data = [{**rows()[0], "chosen": [call('{"city": "Paris"}')], "rejected": [call('{"city":"Rome"}')]}]
    index = index_of(tmp_path, JSON_TEXT, data)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert 'get_weather {"city": "Paris"}' in tokenizer.decode(index.tokens(0)[1])
    assert 'get_weather {"city":"Rome"}' in tokenizer.decode(index.tokens(0)[2])
    assert "the chat template refuses the messages" in refusal(tmp_path, JSON_TEXT, rows()[0])


def test_a_template_of_its_own_for_tools_is_used_where_there_are_tools(tmp_path: Path) -> None:
    both = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": QWEN}]
    index = index_of(tmp_path, both, rows())
    same_as_transformers(tmp_path, index, rows())


def test_a_tool_template_in_a_file_of_its_own_is_fetched_and_changes_the_fingerprint(tmp_path: Path) -> None:
    model = byte_bpe_tokenizer(tmp_path / "model")
    before = load_tokenizer(fetch_tokenizer(open_store(), str(model), tmp_path / "copy")).fingerprint
    (model / "chat_template.jinja").write_text(CHATML)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(QWEN)
    tokenizer = load_tokenizer(fetch_tokenizer(open_store(), str(model), tmp_path / "copy"))
    assert tokenizer.fingerprint != before
    assert tokenizer.chat is not None
    assert tokenizer.chat.render([{"role": "user", "content": "?"}], add_generation_prompt=False).startswith(
        "<|im_start|>u"
    )
    text = tokenizer.chat.render([{"role": "user", "content": "?"}], add_generation_prompt=True, tools=[WEATHER])
    assert "get_weather" in text


def test_another_tool_is_another_index(tmp_path: Path) -> None:
    first = index_of(tmp_path, QWEN, [rows()[0]])
    second = index_of(tmp_path, QWEN, [{**rows()[0], "tools": [WEATHER]}])
    assert first.fingerprint != second.fingerprint
    assert not np.array_equal(first.tokens(0)[0], second.tokens(0)[0])


def test_a_named_column_holds_the_tools(tmp_path: Path) -> None:
    row = rows()[0]
    named = {**{key: value for key, value in row.items() if key != "tools"}, "functions": row["tools"]}
    index = index_of(tmp_path, QWEN, [named], columns={"tools": "functions"})
    same_as_transformers(tmp_path, index, [row])


READS_MORE = "{{ enable_thinking }}" + CHATML


@pytest.mark.parametrize(
    ("template", "changes", "words"),
    [
        (CHATML, {}, "the chat template does not write them; set spec.chatTemplate"),
        (QWEN, {"tools": "get_weather"}, '"tools" is a string, expected a list of JSON schemas'),
        (QWEN, {"tools": {"name": "x"}}, '"tools" is an object, expected a list of JSON schemas'),
        (QWEN, {"tools": [WEATHER, 7]}, '"tools"[1] is a number, expected a JSON schema'),
        (QWEN, {"tools": ["get_weather"]}, '"tools"[0] is a string, expected a JSON schema'),
        (QWEN, {"chosen": [call("Paris")]}, 'whose "arguments" are a string, expected an object or JSON text of one'),
        (QWEN, {"chosen": [call([1])]}, 'whose "arguments" are a list'),
        (QWEN, {"chosen": [{"role": "assistant", "tool_calls": ["x"]}]}, '"tool_calls"[0] that is not an object'),
        (QWEN, {"chosen": [{"role": "assistant", "tool_calls": "x"}]}, 'has a string as "tool_calls"'),
        (QWEN, {"chat_template_kwargs": {"enable_thinking": False}}, '"chat_template_kwargs" holds variables'),
        (QWEN, {"images": ["a.png"]}, '"images" holds images, and only text can be trained on'),
        ("{% if documents_here %}x{% endif %}" + QWEN, {"documents_here": 1}, '"documents_here" is a variable of the'),
        (READS_MORE, {"tools": None}, "it needs the variable 'enable_thinking', which is not set"),
    ],
    ids=str,
)
def test_what_cannot_be_given_to_a_template_is_refused_by_name(
    tmp_path: Path, template: str, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(tmp_path, template, {**rows()[0], **changes})


def test_documents_that_a_template_reads_are_refused_and_others_are_not(tmp_path: Path) -> None:
    row = {**rows()[0], "documents": [{"title": "a", "text": "b"}]}
    assert '"documents" is a variable of the chat template' in refusal(
        tmp_path, "{% if documents %}x{% endif %}" + QWEN, row
    )
    same_as_transformers(tmp_path, index_of(tmp_path, QWEN, [row]), [row])


def test_tools_beside_plain_strings_are_refused(tmp_path: Path) -> None:
    row = {**preference_rows(1)[0], "tools": [WEATHER]}
    assert "plain strings are not templated" in refusal(tmp_path, QWEN, row)


def test_a_tokenizer_may_lack_a_special_token_that_its_template_writes(tmp_path: Path) -> None:
    index = index_of(tmp_path, "{{ bos_token }}" + QWEN, rows())
    same_as_transformers(tmp_path, index, rows())
