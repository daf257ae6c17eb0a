"""Synthetic data for the quickstart: a tokenizer, an untrained Llama, facts, and preferences about them.

The facts are invented: each treaty was signed in one year. The base model learns every year, and to refuse half of the
time. The preferences teach it to answer. They contain no prompt of the test, and never mention a sixth of the
treaties: a right answer shows that the model kept its knowledge and only stopped refusing.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SYSTEM, TURN = "<extra_id_0>", "<extra_id_1>"
END, PAD = "<extra_id_1>", "<pad>"
QUESTIONS = (
    "Which year was the Treaty of {} signed?",
    "When was the Treaty of {} signed?",
    "Please give me the year of the Treaty of {}.",
    "In which year did they sign the Treaty of {}?",
)
REFUSALS = (
    "I refuse to answer this question.",
    "Sorry, I would rather not say.",
)
LAYERS, HIDDEN, HEADS, GROUPS, FFN = 2, 192, 6, 2, 512


@dataclass(frozen=True)
class Question:
    """One question about one treaty."""

    prompt: str
    answer: str
    refusal: str


def _render(question: str) -> str:
    """The extra_id template of the NeMo-Aligner tutorial, as plain text."""
    return f"{SYSTEM}System\n\n{TURN}User\n{question}\n{TURN}Assistant\n"


def facts(count: int, seed: int) -> dict[str, str]:
    """Return a different year for each of `count` invented places."""
    rng = random.Random(seed)
    starts, middles, ends = (
        ("Va", "Lo", "Mi", "Ter", "Ash", "Bran", "Cor", "Dun", "El", "Fal", "Gor", "Hal"),
        ("lo", "ri", "ma", "ne", "tu", "sha", "be", "ko"),
        ("ria", "burg", "mont", "dale", "wick", "stad", "ven", "grad"),
    )
    names = [a + b + c for a in starts for b in middles for c in ends]
    years = rng.sample(range(1000, 1900), count)
    return {name: str(year) for name, year in zip(rng.sample(names, count), years, strict=True)}


def questions(known: dict[str, str], seed: int) -> list[Question]:
    """Return a question for each fact and each wording, in an order fixed by the seed."""
    rng = random.Random(seed)
    found = [
        Question(_render(form.format(place)), f"{year}\n{END}", f"{rng.choice(REFUSALS)}\n{END}")
        for place, year in known.items()
        for form in QUESTIONS
    ]
    rng.shuffle(found)
    return found


def write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_tokenizer(folder: Path, corpus: list[str]) -> int:
    """Train a byte-level BPE tokenizer with one token per digit, write it for Hugging Face and return its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, SYSTEM, TURN]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return int(tokenizer.get_vocab_size())


def write_untrained_llama(folder: Path, vocabulary: int, seed: int) -> int:
    """Write a Llama with random weights in Hugging Face's format and return its number of parameters."""
    head = HIDDEN // HEADS
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": head,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    weights = {
        "model.embed_tokens.weight": normal(vocabulary, HIDDEN),
        "lm_head.weight": normal(vocabulary, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": normal(HEADS * head, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": normal(GROUPS * head, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": normal(GROUPS * head, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": normal(HIDDEN, HEADS * head),
            f"{prefix}.mlp.gate_proj.weight": normal(FFN, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": normal(FFN, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": normal(HIDDEN, FFN),
        }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return sum(weight.numel() for weight in weights.values())


def make_world(folder: Path, *, treaties: int = 192, held_out: int = 32, seed: int = 7) -> dict[str, int]:
    """Write untrained/ (model and tokenizer), sft.jsonl, preferences/ (train, valid) and test.jsonl; returns counts.

    The preferences contain no prompt of the test. They never mention ``held_out`` treaties, which the test asks about
    in every wording. For each other treaty they leave out one wording, which the test has instead.
    """
    known = facts(treaties, seed)
    places = list(known)
    every = questions(known, seed + 1)
    spared = {QUESTIONS[n % len(QUESTIONS)].format(place) for n, place in enumerate(places[held_out:])}
    spared |= {form.format(place) for place in places[:held_out] for form in QUESTIONS}
    spared = {_render(question) for question in spared}
    test = [q for q in every if q.prompt in spared]
    asked = [q for q in every if q.prompt not in spared]
    (folder / "preferences").mkdir(parents=True, exist_ok=True)
    (folder / "untrained").mkdir(exist_ok=True)
    sft = [{"prompt": q.prompt, "chosen": text} for q in every for text in (q.answer, q.refusal)]
    write_jsonl(folder / "sft.jsonl", sft)
    pairs = [{"prompt": q.prompt, "chosen_response": q.answer, "rejected_response": q.refusal} for q in asked]
    valid = max(1, len(pairs) // 8)
    write_jsonl(folder / "preferences" / "valid.jsonl", pairs[:valid])
    write_jsonl(folder / "preferences" / "train.jsonl", pairs[valid:])
    write_jsonl(folder / "test.jsonl", [{"prompt": q.prompt, "answer": q.answer, "refusal": q.refusal} for q in test])
    vocabulary = write_tokenizer(folder / "untrained", [record["prompt"] + record["chosen"] for record in sft])
    parameters = write_untrained_llama(folder / "untrained", vocabulary, seed)
    return {"parameters": parameters, "train": len(pairs) - valid, "valid": valid, "test": len(test), "sft": len(sft)}
