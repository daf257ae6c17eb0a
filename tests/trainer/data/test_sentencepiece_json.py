"""A tokenizer.model gets a tokenizer.json only if transformers reads the same tokens from it."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from dpo_testing.corpora import sentences
from dpo_trainer.data.tokens.tokenizer import load_tokenizer
from dpo_trainer.formats.sentencepiece_json import PROBES, tokenizer_files

KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "as it is": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "symbols of the user": {"user_defined_symbols": ["<extra_id_0>", "<extra_id_1>"], "pad_id": 3},
    "no first space": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 300},
}


def trained(**settings: Any) -> bytes:
    out = io.BytesIO()
    usual = {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400)), model_writer=out, minloglevel=2, num_threads=1, **(usual | settings)
    )
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_from_all_readers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = trained(**KINDS[kind])
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    files = tokenizer_files(model)
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for name, data in {**files, "config.json": b'{"model_type": "stablelm"}'}.items():
        (tmp_path / name).write_bytes(data)
    texts = [*PROBES, *sentences(100, seed=1), "<extra_id_1>a <extra_id_0>", "</s>\n<s>"]
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text, found in zip(texts, ours.encode(texts), strict=True):
        ids = processor.EncodeAsIds(text)
        assert found.tolist() == ids, text
        assert theirs(text).input_ids == ids, text
        if kind != "no bytes":  # what is unknown has another text in each library
            assert theirs.decode(ids) == processor.DecodeIds(ids), text
    assert (ours.bos_id, ours.eos_id, ours.prefix, ours.suffix) == (1, 2, (), ())
    assert processor.eos_id() in ours.end_ids


def test_a_model_whose_tokens_would_differ_gets_none() -> None:
    assert tokenizer_files(trained(model_type="unigram", vocab_size=480)) == {}  # "<s>" in a text would be the symbol
    assert tokenizer_files(b"damaged") == {}
