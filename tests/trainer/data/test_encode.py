"""Token ids of pairs: BOS never doubled, boundaries, end tokens, length policies."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_api.errors import InvalidSpecError
from dpo_api.spec import Data
from dpo_testing.corpora import CHATML, WORDS, byte_bpe_tokenizer, llama_tokenizer, sentencepiece_tokenizer
from dpo_trainer.data.problems import Problem, Reason
from dpo_trainer.data.reading.records import Record
from dpo_trainer.data.tokens.encode import EncodedPair, PairEncoder
from dpo_trainer.data.tokens.tokenizer import Tokenizer, load_tokenizer

KINDS = ("bpe", "llama", "sentencepiece")
BOS = "<|begin_of_text|>"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    base = tmp_path_factory.mktemp("tokenizers")
    folders: dict[str, Path] = {
        "bpe": byte_bpe_tokenizer(base / "bpe"),
        "llama": llama_tokenizer(base / "llama"),
        "sentencepiece": sentencepiece_tokenizer(base / "sp"),
    }
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


def section(**settings: Any) -> Data:
    return Data.model_validate({"train": [{"uri": "x.jsonl"}], **settings})


def encode(tokenizer: Tokenizer, record: Record, **settings: Any) -> EncodedPair | Problem:
    return PairEncoder(tokenizer, section(**settings)).encode([record])[0]


def pair_of(tokenizer: Tokenizer, record: Record, **settings: Any) -> EncodedPair:
    result = encode(tokenizer, record, **settings)
    assert isinstance(result, EncodedPair), result
    return result


def problem_of(tokenizer: Tokenizer, record: Record, **settings: Any) -> Problem:
    result = encode(tokenizer, record, **settings)
    assert isinstance(result, Problem), result
    return result


def chat(prompt: str, chosen: str, rejected: str) -> Record:
    return Record(
        [{"role": "user", "content": prompt}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
    )


STRINGS = Record("Which year?\n", "1215 model", "I refuse")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boundary", ["strict", "separate"])
def test_strings(tokenizers: dict[str, Tokenizer], kind: str, boundary: str) -> None:
    tokenizer = tokenizers[kind]
    pair = pair_of(tokenizer, STRINGS, boundary=boundary)
    prompt, whole, alone = tokenizer.encode(["Which year?\n", "Which year?\n1215 model", "1215 model"])
    assert pair.prompt.tolist() == [*tokenizer.prefix, *prompt.tolist()]
    expected = whole.tolist()[len(prompt) :] if boundary == "strict" else alone.tolist()
    assert pair.chosen.tolist() == expected
    assert len(pair.rejected) > 0
    assert pair.length == len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def test_strict_refuses_a_merge_across_the_boundary(tokenizers: dict[str, Tokenizer]) -> None:
    """The space after "Answer:" belongs to the next word's token in byte-level vocabularies."""
    tokenizer = tokenizers["bpe"]
    record = Record("Answer: ", "the painter", "Bosch")
    assert problem_of(tokenizer, record).reason is Reason.NOT_A_PREFIX
    pair = pair_of(tokenizer, record, boundary="separate")
    assert tokenizer.decode(pair.prompt) + tokenizer.decode(pair.chosen) == "Answer: the painter"


@pytest.mark.parametrize("kind", ["bpe", "llama"])
@pytest.mark.parametrize("boundary", ["strict", "separate"])
def test_messages_are_the_template_cut_in_two(tokenizers: dict[str, Tokenizer], kind: str, boundary: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.chat is not None
    record = chat("Which year?", "1215", "I refuse")
    pair = pair_of(tokenizer, record, boundary=boundary)
    assert isinstance(record.prompt, list)
    assert isinstance(record.chosen, list)
    head = tokenizer.chat.render(record.prompt, add_generation_prompt=True)
    whole = tokenizer.chat.render(record.prompt + record.chosen, add_generation_prompt=False)
    assert tokenizer.decode(pair.prompt) == head
    assert tokenizer.decode(pair.prompt) + tokenizer.decode(pair.chosen) == whole
    assert [*pair.prompt.tolist(), *pair.chosen.tolist()] == tokenizer.encode([whole])[0].tolist()


@given(
    text=st.sampled_from(["hi\n", f"{BOS}hi\n", f"{BOS}{BOS}hi\n", "", BOS]),
    boundary=st.sampled_from(["strict", "separate"]),
)
@pytest.mark.parametrize("add_bos", ["auto", "always", "never"])
@pytest.mark.parametrize("templated", [True, False])
def test_there_are_never_two_bos(
    tokenizers: dict[str, Tokenizer], add_bos: str, templated: bool, text: str, boundary: str
) -> None:
    tokenizer = tokenizers["llama"]
    record = chat(text, "yes", "no") if templated else Record(text, "yes", "no")
    result = encode(tokenizer, record, addBos=add_bos, boundary=boundary)
    if isinstance(result, Problem):  # no BOS and no text: nothing could predict the response's first token
        assert result.reason is Reason.EMPTY_PROMPT
        assert add_bos == "never"
        assert not templated
        return
    leading = next((i for i, token in enumerate(result.prompt) if token != tokenizer.bos_id), len(result.prompt))
    assert leading == (0 if add_bos == "never" else 1)
    assert tokenizer.bos_id not in result.chosen


def test_a_template_without_bos_gets_none_unless_asked(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """The template alone says how a conversation starts, even for a tokenizer that adds a BOS to plain text."""
    chatml = load_tokenizer(llama_tokenizer(tmp_path), chat_template=CHATML)
    assert pair_of(chatml, chat("a", "b", "c")).prompt[0] != chatml.bos_id
    assert pair_of(chatml, chat("a", "b", "c"), addBos="always").prompt[0] == chatml.bos_id
    assert pair_of(chatml, STRINGS).prompt[0] == chatml.bos_id


def test_a_tokenizer_that_ends_texts_itself(tmp_path: Path) -> None:
    """Plain strings get what the tokenizer does: its EOS after the response, none between prompt and response."""
    folder = llama_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    end = {"id": "<|end_of_text|>", "ids": [1], "tokens": ["<|end_of_text|>"]}
    content["post_processor"]["single"].append({"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["<|end_of_text|>"] = end
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.prefix, tokenizer.suffix) == ((0,), (1,))
    for settings in ({}, {"appendEos": True}, {"boundary": "separate"}):
        pair = pair_of(tokenizer, STRINGS, **settings)
        assert pair.prompt.tolist().count(1) == 0
        assert pair.chosen.tolist().count(1) == 1
        assert pair.chosen[-1] == 1
    written = Record("a\n", "b<|end_of_text|>", "c")
    assert pair_of(tokenizer, written).chosen.tolist().count(1) == 1


def test_bos_of_tokenizers_that_add_none(tokenizers: dict[str, Tokenizer]) -> None:
    sp = tokenizers["sentencepiece"]
    assert pair_of(sp, STRINGS).prompt[0] != sp.bos_id
    assert pair_of(sp, STRINGS, addBos="always").prompt[0] == sp.bos_id
    with pytest.raises(InvalidSpecError, match=r"spec\.data\.addBos"):
        encode(tokenizers["bpe"], STRINGS, addBos="always")


def test_an_empty_prompt_needs_a_bos(tokenizers: dict[str, Tokenizer]) -> None:
    record = Record("", "yes", "no")
    assert pair_of(tokenizers["llama"], record).prompt.tolist() == [0]
    problem = problem_of(tokenizers["bpe"], record)
    assert problem.reason is Reason.EMPTY_PROMPT
    assert "addBos" in problem.message


@pytest.mark.parametrize("kind", KINDS)
def test_eos_is_appended_to_strings_only_when_asked_and_once(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    plain, ended = pair_of(tokenizer, STRINGS), pair_of(tokenizer, STRINGS, appendEos=True)
    assert ended.chosen.tolist() == [*plain.chosen.tolist(), tokenizer.eos_id]
    assert ended.rejected.tolist() == [*plain.rejected.tolist(), tokenizer.eos_id]
    assert ended.prompt.tolist() == plain.prompt.tolist()
    if kind == "bpe":
        written = Record(STRINGS.prompt, "1215<|im_end|>", "I refuse<|im_end|>")
        assert pair_of(tokenizer, written, appendEos=True).chosen.tolist().count(2) == 1
        assert pair_of(tokenizer, chat("a", "b", "c"), appendEos=True) is not None
    if kind != "sentencepiece":
        talk = chat("a", "b", "c")
        assert pair_of(tokenizer, talk, appendEos=True).chosen.tolist() == pair_of(tokenizer, talk).chosen.tolist()


def test_end_tokens_are_recognised(tokenizers: dict[str, Tokenizer]) -> None:
    bpe, llama = tokenizers["bpe"], tokenizers["llama"]
    for tokenizer in (bpe, llama):
        encoder = PairEncoder(tokenizer, section())
        assert encoder.ends(pair_of(tokenizer, chat("a", "b", "c")).chosen)  # ChatML: a line break follows it
        assert not encoder.ends(pair_of(tokenizer, STRINGS).chosen)
        assert encoder.ends(pair_of(tokenizer, STRINGS, appendEos=True).chosen)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_length_policies(tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
    record = Record(data.draw(words) + "\n", data.draw(words), data.draw(words))
    limit = data.draw(st.integers(2, 60))
    tokenizer = tokenizers[kind]
    whole = pair_of(tokenizer, record, boundary="separate", maxLength=4096)
    cut = encode(tokenizer, record, boundary="separate", maxLength=limit, overLength="truncate")
    dropped = encode(tokenizer, record, boundary="separate", maxLength=limit, overLength="drop")
    room = limit - len(whole.prompt)
    if whole.length <= limit:
        assert isinstance(cut, EncodedPair)
        assert isinstance(dropped, EncodedPair)
        assert not cut.truncated
        assert cut.chosen.tolist() == whole.chosen.tolist()
        return
    assert isinstance(dropped, Problem)
    assert dropped.reason is Reason.OVER_LENGTH
    assert f"{whole.length} tokens" in dropped.message
    if room < 1:
        assert isinstance(cut, Problem)
        assert cut.reason is Reason.NO_ROOM
        return
    assert isinstance(cut, EncodedPair)
    assert cut.truncated
    assert cut.length == limit
    assert cut.prompt.tolist() == whole.prompt.tolist()
    assert cut.chosen.tolist() == whole.chosen.tolist()[:room]
    assert cut.rejected.tolist() == whole.rejected.tolist()[:room]


def test_templates_that_are_missing_fail_or_rewrite_the_prompt(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    talk = chat("a", "b", "c")
    assert "spec.chatTemplate" in problem_of(tokenizers["sentencepiece"], talk).message
    folder = byte_bpe_tokenizer(tmp_path)
    refuses = load_tokenizer(folder, chat_template="{{ raise_exception('only system') }}")
    assert "only system" in problem_of(refuses, talk).message
    rewrites = load_tokenizer(
        folder, chat_template="{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    problem = problem_of(rewrites, talk)
    assert problem.reason is Reason.TEMPLATE
    assert "cannot be separated" in problem.message


def test_a_batch_keeps_results_with_their_records(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    records = [
        STRINGS,
        Record("Answer: ", "the", "the"),
        chat("a", "b", "c"),
        Record("", "x", "y"),
        Record("p\n", "q", None),
    ]
    batch = PairEncoder(tokenizer, section()).encode(records)
    for record, together in zip(records, batch, strict=True):
        alone = encode(tokenizer, record)
        if isinstance(alone, Problem):
            assert together == alone
            continue
        assert isinstance(together, EncodedPair)
        for part in ("prompt", "chosen", "rejected"):
            assert getattr(together, part).tolist() == getattr(alone, part).tolist()
    assert isinstance(batch[4], EncodedPair)
    assert batch[4].rejected.tolist() == []


def test_sentencepiece_bos_written_in_text_is_text(tokenizers: dict[str, Tokenizer]) -> None:
    sp = tokenizers["sentencepiece"]
    assert sp.bos_id not in pair_of(sp, Record("<s>hi\n", "yes", "no")).prompt
