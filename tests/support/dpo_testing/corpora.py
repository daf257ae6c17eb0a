"""Tiny tokenizers made in code, and preference files: real libraries, no downloads.

Each tokenizer folder looks like one of the families that users bring:

- ``byte_bpe_tokenizer``: Qwen-like; byte-level BPE, no BOS, ChatML template, end token ``<|im_end|>``; -
``llama_tokenizer``: Llama-3-like; byte-level BPE whose post-processor adds a BOS, a template that renders the BOS
itself and prints today's date; - ``sentencepiece_tokenizer``: a bare ``tokenizer.model`` as in a ``.nemo`` archive.
"""

import gzip
import io
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import zstandard
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dpo_api.spec import Columns
from dpo_trainer.data.problems import Problem
from dpo_trainer.data.reading.records import Record, record_of
from dpo_trainer.data.reading.rows import load_line

Row = Mapping[str, Any]

VOCABULARY = """
the a of to and in is was for on that with as it by from at which Magna Carta signed year painter medieval
name famous answer question question: Answer: please give me refuse this 1215 1984 Bosch Hockney David
Hieronymus model prefers chosen rejected prompt response über naïve 東京 🙂 don't I'm x=y; {} [] \n hello world
"""
WORDS = tuple(VOCABULARY.split())

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def parse_line(line: bytes, columns: Columns, *, rejected_needed: bool = True) -> Record | Problem:
    """The record of one line."""
    row = load_line(line)
    return row if isinstance(row, Problem) else record_of(row, columns, rejected_needed=rejected_needed)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Deterministic word salad."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 14))) for _ in range(count)]


@cache
def _byte_bpe(vocab_size: int, specials: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(400), trainer)
    text: str = tokenizer.to_str()
    return text


def _write_folder(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_bpe_tokenizer(folder: Path, vocab_size: int = 512) -> Path:
    """Qwen-like folder: no BOS, ``<|endoftext|>`` = 0, ``<|im_start|>`` = 1, ``<|im_end|>`` = 2 (the EOS)."""
    tokenizer = Tokenizer.from_str(_byte_bpe(vocab_size, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    return _write_folder(
        folder,
        tokenizer,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
            "model_max_length": 4096,
        },
    )


def llama_tokenizer(folder: Path, vocab_size: int = 512) -> Path:
    """Llama-3-like folder: BOS ``<|begin_of_text|>`` = 0 is added to every text; the template renders it as well."""
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer = Tokenizer.from_str(_byte_bpe(vocab_size, specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", 0)]
    )
    _write_folder(
        folder,
        tokenizer,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "chat_template": LLAMA3,
        },
    )
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))
    return folder


@cache
def sentencepiece_bytes(vocab_size: int) -> bytes:
    """A tokenizer.model: see ``sentencepiece_tokenizer``."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400)),
        model_writer=out,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def sentencepiece_tokenizer(folder: Path, vocab_size: int = 500) -> Path:
    """A bare ``tokenizer.model`` (BPE with byte fallback): unk = 0, BOS = 1, EOS = 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(vocab_size))
    return folder


def preference_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows in the tutorial's form, with its extra_id template; strict boundaries hold for every tokenizer here."""
    texts = sentences(3 * count, seed)
    return [
        {
            "prompt": f"<extra_id_0>System\n\n<extra_id_1>User\n{texts[3 * i]}\n<extra_id_1>Assistant\n",
            "chosen_response": f"{texts[3 * i + 1]}\n<extra_id_1>",
            "rejected_response": f"{texts[3 * i + 2]}\n<extra_id_1>",
        }
        for i in range(count)
    ]


def chat_rows(count: int, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """The same kind of pairs as message lists."""
    texts = sentences(3 * count, seed)
    return [
        {
            "prompt": [{"role": "user", "content": texts[3 * i]}],
            "chosen": [{"role": "assistant", "content": texts[3 * i + 1]}],
            "rejected": [{"role": "assistant", "content": texts[3 * i + 2]}],
        }
        for i in range(count)
    ]


def jsonl(rows: Iterable[Row | str]) -> bytes:
    """Write one JSON object per line; strings are written unchanged (for broken lines)."""
    lines: Sequence[str] = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    return "".join(line + "\n" for line in lines).encode()


def write_jsonl(path: Path, rows: Iterable[Row | str]) -> Path:
    """Write rows; ``.gz`` and ``.zst`` names are compressed."""
    data = jsonl(rows)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
