"""A tiny Llama of random weights, its tokenizer and preferences, written with the standard library alone.

The operator's image has neither torch nor tokenizers. A safetensors file is a length, a JSON header and bytes; the
tokenizer has one token per word.
"""

from __future__ import annotations

import array
import json
import random
import struct
import sys
from pathlib import Path

LAYERS, HIDDEN, HEADS, FFN = 2, 64, 4, 128

TOPICS = ("tea", "rain", "music", "books", "boats", "maps", "bread", "snow", "chess", "birds", "trains", "wool")
QUESTIONS = ("do you like {} ?", "tell me about {} .", "shall we talk of {} ?", "what of {} today ?")
CHOSEN, REJECTED = "yes , gladly .", "no , never ."
PAD, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


def make(folder: Path) -> dict[str, int]:
    """Write model/, train.jsonl and valid.jsonl; return the number of parameters and of pairs."""
    pairs = [
        {"prompt": f"{question.format(topic)} ", "chosen": f"{CHOSEN} {END}", "rejected": f"{REJECTED} {END}"}
        for topic in TOPICS
        for question in QUESTIONS
    ]
    random.Random(7).shuffle(pairs)
    valid = len(pairs) // 4
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    words = {word for pair in pairs for text in pair.values() for word in text.split()}
    vocabulary = [PAD, START, END, UNKNOWN, *sorted(words - {END})]
    _write_tokenizer(model, vocabulary)
    parameters = _write_model(model, len(vocabulary))
    for name, part in (("train.jsonl", pairs[valid:]), ("valid.jsonl", pairs[:valid])):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in part), encoding="utf-8")
    return {"parameters": parameters, "train": len(pairs) - valid, "valid": valid}


def _write_tokenizer(folder: Path, vocabulary: list[str]) -> None:
    special = [
        {"id": number, "content": vocabulary[number], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number in range(4)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(vocabulary)},
            "unk_token": UNKNOWN,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _write_model(folder: Path, vocabulary: int) -> int:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, FFN)
    return _write_safetensors(folder / "model.safetensors", shapes)


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Write norms of ones and matrices of small random numbers, as float32; return their number."""
    draw = random.Random(7)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    numbers = array.array("f")
    for name, shape in shapes.items():
        start = len(numbers)
        if len(shape) == 1:
            numbers.extend([1.0] * shape[0])
        else:
            numbers.extend(draw.gauss(0.0, 0.05) for _ in range(shape[0] * shape[1]))
        offsets = [start * numbers.itemsize, len(numbers) * numbers.itemsize]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    if sys.byteorder == "big":
        numbers.byteswap()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers.tobytes())
    return len(numbers)
