"""Tokenizers of .nemo archives and of Megatron-LM's checkpoints: what is read gives the tokens of transformers."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dpo_api.errors import InvalidModelError, NotFoundError
from dpo_api.inputs import Model
from dpo_api.models import FAMILIES
from dpo_api.models.folder import OWN_TOKENIZER, Files
from dpo_api.models.start import check_tokenizer, start_model
from dpo_store import join_uri
from dpo_testing.corpora import sentences
from dpo_testing.megatron_folders import arguments, core, stacked, torch_dist
from dpo_testing.models import local_store, reference_model, save_folder
from dpo_testing.nemo_archives import GPT_2B, LLAMA, NEMOTRON, Tiny, content, replace, state, write
from dpo_trainer.convert import command
from dpo_trainer.data.tokens.tokenizer import fetch_tokenizer, load_tokenizer

VOCABULARY, MERGES = "0b1_vocab.json", "0b2_merges.txt"
GPT2: dict[str, Any] = {
    "library": "megatron",
    "type": "GPT2BPETokenizer",
    "model": None,
    "vocab_file": f"nemo:{VOCABULARY}",
    "merge_file": f"nemo:{MERGES}",
}
FILES = ["config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
TEXTS = (
    "Hello  world, it's 12345 naïve\n\n 東京 <|endoftext|>x",
    "I'll we'RE 'tis\tdon't  \r\n 3.14e-10 \u00a0\u3000\u200b",
    "<|endoftext|> <|endoftext|><|endoftext|",
    "e\u0301 ﬁ ① Ἀ 🙂👍🏽 \u0000\u0001\u007f",
    " ",
    "",
    *sentences(50, seed=3),
)


@cache
def gpt2_files() -> tuple[bytes, bytes]:
    """A vocabulary and merges of byte-level BPE, in the form of GPT-2's files."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(sentences(400), trainer)
    model = json.loads(made.to_str())["model"]
    ids = sorted(model["vocab"].values())
    vocabulary = {token: ids[-1] - number for token, number in model["vocab"].items()}  # the special token last
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    return json.dumps(vocabulary).encode(), merges.encode()


def theirs(folder: Path) -> Any:
    """transformers' tokenizer from the same two files."""
    from transformers import GPT2TokenizerFast

    folder.mkdir()
    for name, data in zip(("vocab.json", "merges.txt"), gpt2_files(), strict=True):
        (folder / name).write_bytes(data)
    return GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def archive(
    path: Path, tokenizer: Mapping[str, Any] | None, members: Mapping[str, bytes] | None = None, tiny: Tiny = GPT_2B
) -> tuple[Files, str]:
    """A start model whose tokenizer has these settings and files."""
    found = content(tiny, state(tiny))
    config = yaml.safe_load(found["model_config.yaml"]) | {"tokenizer": None if tokenizer is None else dict(tokenizer)}
    found["model_config.yaml"] = yaml.safe_dump(config).encode()
    if members is None:
        members = dict(zip((VOCABULARY, MERGES), gpt2_files(), strict=True))
    write(path, found | members)
    return start_model(local_store(), Model.model_validate({"nemo": {"uri": str(path)}}))


@pytest.mark.parametrize("tiny", [GPT_2B, LLAMA, NEMOTRON], ids=["stablelm", "llama", "nemotron"])
def test_a_vocabulary_with_merges_gives_gpt2s_tokens(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files, uri = archive(tmp_path / "m.nemo", GPT2, tiny=tiny)
    check_tokenizer(files, uri)
    assert sorted(files.children(uri)) == FILES
    gold = theirs(tmp_path / "gold")
    assert json.loads(files.read(join_uri(uri, "tokenizer.json"))) == json.loads(gold.backend_tokenizer.to_str())
    ours = load_tokenizer(fetch_tokenizer(files, uri, tmp_path / "fetched"))
    command.main([uri, str(tmp_path / "out")])
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert ids.tolist() == gold(text).input_ids == exported(text).input_ids, text
        assert exported.decode(ids.tolist()) == gold.decode(ids.tolist()) == text
    end = gold.eos_token_id
    assert end == max(gold.get_vocab().values())
    assert (ours.bos_id, ours.eos_id, ours.prefix, ours.suffix, ours.size) == (end, end, (), (), end + 1)
    assert end in ours.end_ids


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "megatron-gpt-345m"},
        {"library": "huggingface", "type": "gpt2"},
        {"vocab_file": f"/of/its/author/{VOCABULARY}", "merge_file": f"nemo:./{MERGES}", "special_tokens": {}},
    ],
    ids=["the name before 1.0", "of the hub's library", "paths"],
)
def test_other_names_of_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    files, uri = archive(tmp_path / "m.nemo", GPT2 | changes)
    check_tokenizer(files, uri)
    assert files.read(join_uri(uri, "merges.txt")) == gpt2_files()[1]
    assert sorted(files.children(uri)) == FILES


def test_a_folder_of_a_tokenizer_inside(tmp_path: Path) -> None:
    inside = {"0b3_mine/tokenizer.json": b"{}", "0b3_mine/tokenizer_config.json": b"{ }", "0b3_mine/more.txt": b""}
    settings = {"library": "huggingface", "type": "nemo:0b3_mine"}
    files, uri = archive(tmp_path / "m.nemo", settings, inside)
    check_tokenizer(files, uri)
    assert files.children(uri) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert files.read(join_uri(uri, "tokenizer_config.json")) == b"{ }"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"library": "huggingface", "type": "org/name"},
            r'tokenizer\.type is "org/name": a tokenizer\'s name on a hub, and nothing is downloaded; set spec\.tok',
        ),
        ({"library": "huggingface", "type": "gpt2"}, r'tokenizer\.type is "gpt2": a tokenizer\'s name on a hub'),
        ({"library": "huggingface", "type": None}, r"tokenizer\.type is null: a tokenizer's name on a hub"),
        (
            GPT2 | {"type": "BertWordPieceCase"},
            r'type is "BertWordPieceCase": of this library only GPT2BPETokenizer is read; set spec\.tokenizer\.uri to',
        ),
        (GPT2 | {"merge_file": None}, r"tokenizer\.merge_file is null: it holds no such file; set spec\.tokenizer\.u"),
        (GPT2 | {"vocab_file": "nemo:x.json"}, r'tokenizer\.vocab_file is "nemo:x\.json": it holds no such file'),
        (GPT2 | {"special_tokens": {"eos_token": "<e>"}}, r"special_tokens is .*<e>.*: only GPT-2's own token is read"),
        ({"library": "sentencepiece", "model": "nemo:gone.model"}, r'tokenizer\.model is "nemo:gone\.model": it holds'),
        (
            {"library": "yttm", "model": "nemo:x"},
            r'library is "yttm": read are sentencepiece, megatron and huggingface',
        ),
        (None, r"tokenizer is null: it says nothing about the tokenizer; set spec\.tokenizer\.uri"),
    ],
)
def test_a_tokenizer_that_is_not_read_is_named(settings: dict[str, Any] | None, says: str, tmp_path: Path) -> None:
    files, uri = archive(tmp_path / "m.nemo", settings)
    with pytest.raises(InvalidModelError, match=rf"m\.nemo/model_config\.yaml: .*{says}"):
        check_tokenizer(files, uri)
    assert files.children(uri) == ["config.json"]  # a job that sets spec.tokenizer.uri runs


@pytest.mark.parametrize(
    ("vocabulary", "merges", "says"),
    [
        (b"[", b"", "not a vocabulary in JSON with merges in UTF-8"),
        (b"{}", b"\xff", "not a vocabulary in JSON with merges in UTF-8"),
        (b'["a"]', b"", "the vocabulary must map each token to its id"),
        (b'{"a": true}', b"", "the vocabulary must map each token to its id"),
        (b'{"a": 0, "b": 1, "ab": 2}', b"#version: 0.2\na b\nb a\n", "the merge 'b a' is not one of two tokens"),
        (b'{"a": 0, "b": 1, "ab": 2}', b"a b c\n", "the merge 'a b c' is not one of two tokens"),
    ],
)
def test_damaged_files_are_named(vocabulary: bytes, merges: bytes, says: str, tmp_path: Path) -> None:
    files, uri = archive(tmp_path / "m.nemo", GPT2, {VOCABULARY: vocabulary, MERGES: merges})
    with pytest.raises(InvalidModelError, match=rf"m\.nemo/model_config\.yaml: {says}.*or set spec\.tokenizer\.uri"):
        fetch_tokenizer(files, uri, tmp_path / "fetched")


def test_a_family_that_transformers_gives_one_tokenizer(tmp_path: Path) -> None:
    files, uri = archive(tmp_path / "m.nemo", GPT2, tiny=replace(LLAMA, qkv_bias=True))
    with pytest.raises(InvalidModelError, match="its tokenizer is GPT-2's, and the model is one of the family qwen2"):
        check_tokenizer(files, uri)


@pytest.mark.parametrize("family", FAMILIES)
def test_those_families_are_the_ones_of_the_table(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files, uri = archive(tmp_path / "m.nemo", GPT2)
    folder = fetch_tokenizer(files, uri, tmp_path / "folder")
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    same = [AutoTokenizer.from_pretrained(folder)(text).input_ids for text in TEXTS] == [
        ids.tolist() for ids in load_tokenizer(_without_config(folder, tmp_path / "bare")).encode(TEXTS)
    ]
    assert same is (family not in OWN_TOKENIZER)


def _without_config(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt")])
def test_a_checkpoint_of_megatron_lm(names: tuple[str, str], tmp_path: Path) -> None:
    named = {"vocab_file": "/data/gpt2-vocab.json", "merge_file": "/data/gpt2-merges.txt"}
    said = arguments(GPT_2B, tokenizer_type="GPT2BPETokenizer", **named)
    folder = torch_dist(
        tmp_path / "c", stacked(core(state(GPT_2B)), GPT_2B.layers), {"common_state/shard_0_1": [{"args": said}]}
    )
    files, uri = start_model(local_store(), Model.model_validate({"megatron": {"uri": str(folder)}}))
    with pytest.raises(NotFoundError, match=r"holds no tokenizer"):
        check_tokenizer(files, uri)
    for name, data in zip(names, gpt2_files(), strict=True):
        (folder / name).write_bytes(data)
    files, uri = start_model(local_store(), Model.model_validate({"megatron": {"uri": str(folder)}}))
    check_tokenizer(files, uri)
    ours = load_tokenizer(fetch_tokenizer(files, uri, tmp_path / "fetched"))
    gold = theirs(tmp_path / "gold")
    assert [ids.tolist() for ids in ours.encode(TEXTS)] == [gold(text).input_ids for text in TEXTS]


def qwen_like(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    found = json.loads(files["tokenizer.json"])
    words = {"type": "Split", "pattern": {"Regex": r"\d|\s+|[^\s\d]+"}, "behavior": "Isolated", "invert": False}
    levels = [words, {**found["pre_tokenizer"], "use_regex": False}]
    found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": levels}
    return {**files, "tokenizer.json": json.dumps(found).encode()}


FORMS: dict[str, Any] = {
    "gpt2": lambda files: files,
    "gpt2 without tokenizer.json": lambda files: {
        **{name: data for name, data in files.items() if name != "tokenizer.json"},
        "tokenizer_config.json": b'{"tokenizer_class": "GPT2TokenizerFast"}',
    },
    "other words": qwen_like,
    "nobody says": lambda files: {name: files[name] for name in ("vocab.json", "merges.txt")},
}


@pytest.mark.parametrize("form", FORMS)
def test_only_gpt2s_own_tokenizer_becomes_nemos(form: str, tmp_path: Path) -> None:
    """NeMo would cut the texts of any other one into other words."""
    source = save_folder(reference_model("llama"), tmp_path / "source")
    for path in (source / "tokenizer_config.json", source / "chat_template.jinja"):
        path.unlink()
    made, uri = archive(tmp_path / "m.nemo", GPT2)
    for name, data in FORMS[form]({name: made.read(join_uri(uri, name)) for name in FILES[1:]}).items():
        (source / name).write_bytes(data)
    assert command.main([str(source), str(tmp_path / "there.nemo")]) == 0
    files, uri = start_model(local_store(), Model.model_validate({"nemo": {"uri": str(tmp_path / "there.nemo")}}))
    if form.startswith("gpt2"):
        check_tokenizer(files, uri)
        assert files.read(join_uri(uri, "vocab.json")) == gpt2_files()[0]
    else:
        with pytest.raises(InvalidModelError, match=r"tokenizer\.type is null: .*set spec\.tokenizer\.uri"):
            check_tokenizer(files, uri)
