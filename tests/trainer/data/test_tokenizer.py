"""Three kinds of tokenizer folders, their special tokens and templates, held against the libraries themselves."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_store import open_store
from dpo_testing.corpora import CHATML, byte_bpe_tokenizer, llama_tokenizer, sentencepiece_tokenizer, sentences
from dpo_trainer.data.tokens.chat import TEMPLATE_DATE, ChatTemplate, TemplateFailedError
from dpo_trainer.data.tokens.tokenizer import _configuration, fetch_tokenizer, load_tokenizer

TALK = [
    {"role": "user", "content": "Which year? <b>&</b>"},
    {"role": "assistant", "content": " 1215 "},
    {"role": "user", "content": "and 東京?"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    return {
        "bpe": byte_bpe_tokenizer(base / "bpe"),
        "llama": llama_tokenizer(base / "llama"),
        "sentencepiece": sentencepiece_tokenizer(base / "sp"),
    }


@pytest.mark.parametrize("kind", ["bpe", "llama"])
def test_ids_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    ours, theirs = load_tokenizer(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    texts = [*sentences(20, seed=5), "", "<|eot_id|>x<|im_end|>", "\ttab\r\n", "a" * 500]
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert [*ours.prefix, *ids.tolist(), *ours.suffix] == theirs(text)["input_ids"]
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("llama", "LlamaTokenizer"),  # byte-level, so transformers takes another class than the one that is named
        ("llama", "PreTrainedTokenizerFast"),
        ("mistral", "LlamaTokenizerFast"),
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen2", "PreTrainedTokenizerFast"),
        ("gpt2", "GPT2Tokenizer"),
        ("phi3", "LlamaTokenizer"),
        ("deepseek_v2", "LlamaTokenizerFast"),
    ],
)
def test_the_class_is_the_one_that_transformers_takes_for_the_model(
    folders: dict[str, Path], tmp_path: Path, model: str, named: str
) -> None:
    """With the model's type alone, as with its whole configuration."""
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    held = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**held, "tokenizer_class": named}))
    (folder / "config.json").write_text(json.dumps({"model_type": model}))
    assert _configuration(folder) is not None
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours._backend._tokenizer) is type(theirs)  # type: ignore[attr-defined]
    for text, ids in zip(texts := sentences(20, seed=5), ours.encode(texts), strict=True):
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
     ("tokenizer_config.json", {"tokenizer_class": None}), ("config.json", {"model_type": None})],
)  # fmt: skip
def test_what_needs_the_whole_configuration_gets_it(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    files = {"config.json": {"model_type": "llama"}, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}
    for file, held in files.items():
        more = changes if file == name else {}
        kept = {key: value for key, value in {**held, **more}.items() if value is not None}
        (tmp_path / file).write_text(json.dumps(kept))
    assert _configuration(tmp_path) is None


def test_ids_are_those_of_sentencepiece(folders: dict[str, Path]) -> None:
    ours = load_tokenizer(folders["sentencepiece"])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    texts = [*sentences(20, seed=5), "<s>not a control symbol</s>"]
    assert [ids.tolist() for ids in ours.encode(texts)] == theirs.encode(texts)
    assert (ours.bos_id, ours.eos_id, ours.prefix, ours.suffix) == (1, 2, (), ())
    assert ours.chat is None
    assert 1 not in {number for ids in ours.encode(texts) for number in ids.tolist()}


def test_special_tokens(folders: dict[str, Path]) -> None:
    bpe, llama = load_tokenizer(folders["bpe"]), load_tokenizer(folders["llama"])
    assert (bpe.bos_id, bpe.eos_id, bpe.prefix, bpe.suffix) == (None, 2, (), ())
    assert (llama.bos_id, llama.eos_id, llama.prefix, llama.suffix) == (0, 1, (0,), ())
    assert 2 in bpe.end_ids
    assert {1, 2} <= llama.end_ids
    assert 0 not in llama.end_ids


def test_padding_and_truncation_left_in_tokenizer_json_are_ignored(tmp_path: Path) -> None:
    folder = llama_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|end_of_text|>",
    }
    plain = load_tokenizer(folder).encode(["a b c d e f g h"])[0].tolist()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(["a b c d e f g h"])[0].tolist() == plain
    assert (tokenizer.prefix, tokenizer.suffix) == ((0,), ())
    assert len(plain) > 3


@pytest.mark.parametrize("kind", ["bpe", "llama"])
@pytest.mark.parametrize("generation", [True, False])
def test_templates_render_as_transformers_does(folders: dict[str, Path], kind: str, generation: bool) -> None:
    chat, theirs = load_tokenizer(folders[kind]).chat, AutoTokenizer.from_pretrained(folders[kind])
    assert chat is not None
    date = {"date_string": TEMPLATE_DATE.strftime("%d %b %Y")} if kind == "llama" else {}
    expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generation, **date)
    assert chat.render(TALK, add_generation_prompt=generation) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
        "{{ bos_token }}{% for m in messages %}{{ loop.index }}{{ m.content | trim }}{{ eos_token }}{% endfor %}",
        "{{ tools is none }}{{ messages | map(attribute='role') | list | tojson(indent=1) }}",
    ],
)
def test_other_templates_render_as_transformers_does(folders: dict[str, Path], source: str) -> None:
    theirs = AutoTokenizer.from_pretrained(folders["llama"])
    chat = load_tokenizer(folders["llama"], chat_template=source).chat
    assert chat is not None
    expected = theirs.apply_chat_template(TALK, chat_template=source, tokenize=False)
    assert chat.render(TALK, add_generation_prompt=False) == expected


def test_templates_see_one_fixed_date() -> None:
    asks = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {})
    assert asks.render([], add_generation_prompt=False) == "2024-07-26"
    assert asks.uses_date
    assert not ChatTemplate(CHATML, {}).uses_date


def test_template_extensions_of_transformers() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ {'a': '<é>'} | tojson }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert ChatTemplate(source, {}).render(messages, add_generation_prompt=False) == 'u{"a": "<é>"}'


def test_template_failures_are_one_sentence() -> None:
    with pytest.raises(InvalidModelError, match="line 1"):
        ChatTemplate("{% if %}", {})
    with pytest.raises(TemplateFailedError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render([], add_generation_prompt=True)
    with pytest.raises(TemplateFailedError):  # the sandbox
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render([], add_generation_prompt=True)


def test_the_spec_can_replace_the_template(folders: dict[str, Path]) -> None:
    own = load_tokenizer(folders["llama"])
    other = load_tokenizer(folders["llama"], chat_template=CHATML)
    assert other.chat is not None
    assert other.chat.source == CHATML
    assert own.fingerprint != other.fingerprint
    assert own.fingerprint == load_tokenizer(folders["llama"]).fingerprint


def test_a_template_file_is_read_and_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = byte_bpe_tokenizer(tmp_path)
    before = load_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    after = load_tokenizer(folder)
    assert after.chat is not None
    assert after.chat.render(TALK, add_generation_prompt=True) == TALK[0]["content"]
    assert before.fingerprint != after.fingerprint


def test_vocabularies_that_disagree(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders["bpe"])
    assert tokenizer.check_vocabulary(tokenizer.size) == []
    assert tokenizer.check_vocabulary(tokenizer.size + 100) == []
    with pytest.raises(InvalidModelError, match=rf"{tokenizer.size} ids .* holds {tokenizer.size - 1}"):
        tokenizer.check_vocabulary(tokenizer.size - 1)
    assert "same model" in tokenizer.check_vocabulary(10 * tokenizer.size)[0]

    folder = byte_bpe_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"pad_token": "[PAD]"})  # what many fine-tunes do, without resizing the model
    theirs.save_pretrained(folder)
    padded = load_tokenizer(folder)
    assert padded.size == tokenizer.size + 1
    assert "1 added token" in padded.check_vocabulary(tokenizer.size)[0]


def test_folders_without_or_with_a_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"spec\.tokenizer\.uri"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotFoundError, match=r"^s3://models/x holds no tokenizer"):
        load_tokenizer(tmp_path, name="s3://models/x")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(InvalidModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf")
    with pytest.raises(InvalidModelError, match="SentencePiece"):
        load_tokenizer(tmp_path)


def test_fetching_copies_the_tokenizer_and_nothing_else(folders: dict[str, Path], tmp_path: Path) -> None:
    source = llama_tokenizer(tmp_path / "model")
    (source / "model.safetensors").write_bytes(b"large")
    (source / "sub").mkdir()
    (source / "sub" / "tokenizer.json").write_text("{}")
    target = tmp_path / "copy"
    target.mkdir()
    (target / "tokenizer.model").write_bytes(b"of an earlier model")
    fetched = fetch_tokenizer(open_store(), str(source), target)
    assert {path.name for path in fetched.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert load_tokenizer(fetched).fingerprint == load_tokenizer(folders["llama"]).fingerprint
