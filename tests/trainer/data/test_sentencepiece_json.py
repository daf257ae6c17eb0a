"""A tokenizer.model gets a tokenizer.json only if transformers reads the same tokens from it."""

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from dpo_testing.corpora import sentences
from dpo_trainer.data.tokens.tokenizer import load_tokenizer
from dpo_trainer.formats.sentencepiece_json import PROBES, tokenizer_files
from dpo_trainer.formats.sentencepiece_normal import InexactError

SYMBOLS = ["<extra_id_0>", "<extra_id_1>"]
KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "as it is": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "lines": {"normalization_rule_name": "identity"},
    "symbols of the user": {"user_defined_symbols": SYMBOLS, "pad_id": 3},
    "a line end of the user": {"user_defined_symbols": ["\n"], "remove_extra_whitespaces": False},
    "words of the user": {"user_defined_symbols": ["swer", "hen"]},
    "known characters": {"required_chars": "</>_sunkx0123456789ABCDEF"},
    "no first space": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 300},
}


@cache
def _trained(settings: str) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400)), model_writer=out, minloglevel=2, num_threads=1, **json.loads(settings)
    )
    return out.getvalue()


def trained(**settings: Any) -> bytes:
    usual = {"vocab_size": 480, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
    return _trained(json.dumps(usual | settings))


def nasty(count: int) -> list[str]:
    """Texts of parts that normalisations, fallbacks and symbols treat unlike."""
    draw = random.Random(7)
    parts = [*"abcers 1.,▁", " ", "  ", "\t", "\n", "\r\n", "\x00", "\x01", "\x02", "\x1b", "\x7f", "\x85", "\u200b"]
    parts += [
        "\u200d",
        "\ufeff",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\ufe0f",
        "\u20e3",
        "👍🏽",
        "🇩🇪",
        "👩\u200d💻",
        "\U0010ffff",
    ]
    parts += ["e", "\u0301", "\u0302", "\u0323", "\u0308", "ﬁ", "①", "Å", "Ａ", "½", "ﷺ", "´", "…", "\u0344", "\u1ecd"]
    parts += ["か", "\u3099", "ｶ", "ﾞ", "\u1112", "\u1161", "\u11ab", "하", "ㅎ", "ㅏ", "㉠", "ﾡ", "ￂ", "한"]
    parts += [
        "ش",
        "\u0651",
        "\u064e",
        "ش\u0651\u064e",
        "\u05e9",
        "\u05bc",
        "\u05c1",
        "क",
        "\u093c",
        "\u094d",
        "ำ",
        "ກ",
        "ຳ",
    ]
    parts += [
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "<0x3C>",
        "<0x",
        "<",
        ">",
        *SYMBOLS,
        "<extra_id_",
        *sentences(20, seed=2),
    ]
    return ["".join(draw.choices(parts, k=draw.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_from_all_readers(kind: str, model_type: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = trained(model_type=model_type, **KINDS[kind])
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    files = tokenizer_files(model)
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for name, data in {**files, "config.json": b'{"model_type": "stablelm"}'}.items():
        (tmp_path / name).write_bytes(data)
    texts = [*PROBES, *sentences(100, seed=1), "<extra_id_1>a <extra_id_0>", "</s>\n<s>", "\x01", *nasty(400)]
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text, found in zip(texts, ours.encode(texts), strict=True):
        ids = processor.EncodeAsIds(text)
        assert found.tolist() == ids, text
        assert theirs(text).input_ids == ids, text
        if kind != "no bytes":  # what is unknown has another text in each library
            assert theirs.decode(ids) == processor.DecodeIds(ids), text
    assert (ours.bos_id, ours.eos_id, ours.prefix, ours.suffix) == (1, 2, (), ())
    assert processor.eos_id() in ours.end_ids


def changed(model: bytes, change: Any) -> bytes:
    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    change(proto)
    found: bytes = proto.SerializeToString()
    return found


def without(piece: str) -> Any:
    def change(proto: Any) -> None:
        (index,) = (number for number, found in enumerate(proto.pieces) if found.piece == piece)
        del proto.pieces[index]

    return change


@pytest.mark.parametrize(
    ("settings", "change", "says"),
    [
        (
            {"model_type": "char", "byte_fallback": False},
            None,
            "its model_type is 4: only unigram and BPE are converted",
        ),
        ({"treat_whitespace_as_suffix": True}, None, "spaces at the end of words"),
        ({"normalization_rule_name": "nfkc"}, None, "its normalisation nfkc keeps control characters"),
        (
            {"normalization_rule_name": "nmt_nfkc_cf"},
            None,
            "its normalisation nmt_nfkc_cf replaces .* no normalizer does",
        ),
        ({"user_defined_symbols": ["<ﬁ>"]}, None, "would change the user-defined symbol '<ﬁ>'"),
        ({"user_defined_symbols": ["e"]}, None, "the user-defined symbol 'e' is the start of"),
        ({"model_type": "unigram"}, without("e"), "'e' of the piece '.*' is no piece itself"),
    ],
)
def test_what_a_tokenizer_json_cannot_say_is_named(settings: dict[str, Any], change: Any, says: str) -> None:
    model = trained(**settings)
    with pytest.raises(InexactError, match=says):
        tokenizer_files(model if change is None else changed(model, change))


def test_a_damaged_model_is_named() -> None:
    with pytest.raises(InexactError, match="SentencePiece does not read it"):
        tokenizer_files(b"damaged")
