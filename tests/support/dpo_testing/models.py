"""Tiny Hugging Face models of every family with every parameter random, and a process group of one to run them in.

A fresh transformers model has zero biases, unit norms and logits of std 0.1: parity on it proves little.
"""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.models import read_config
from dpo_store import Store, open_store
from dpo_trainer.distributed import World
from dpo_trainer.formats.huggingface import load_weights
from dpo_trainer.model.build import build_model
from dpo_trainer.model.pack import Pack, Segment

VOCABULARY = 131

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 16.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
}
#: name → (transformers' configuration class, what differs from the common shape)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}, "head_dim": 16},
    ),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": _YARN, "head_dim": 16, "max_position_embeddings": 64}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e3}}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "phi3": ("Phi3Config", {"sliding_window": 9, "rope_parameters": {"partial_rotary_factor": 0.75}}),
    "smollm3": (
        "SmolLM3Config",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 7},
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.7,
        },
    ),
    "olmo2": ("Olmo2Config", {"head_dim": 12}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e3},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "nemotron": ("NemotronConfig", {"head_dim": 12, "rope_parameters": {"rope_theta": 1e3}}),
}
FROM_1 = ("NemotronLayerNorm1P", "Gemma3RMSNorm")
"""transformers' norms whose weight is a difference from 1."""


def reference_model(variant: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A transformers model with every parameter random and logits of std ≥ 1."""
    import transformers

    name, changes = VARIANTS[variant]
    config = getattr(transformers, name)(**{**_SHAPE, **changes, **overrides})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    return model.to(dtype)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter: matrices and biases around 0, factors of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                whole = (
                    name.endswith("weight")
                    and type(model.get_submodule(name.rpartition(".")[0])).__name__ not in FROM_1
                )
                parameter.copy_((1.0 if whole else 0.0) + 0.3 * draw)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * draw)
            else:
                scale = 1.2 if "embed" in name or "lm_head" in name else 1.0
                parameter.copy_(draw * scale / parameter.shape[-1] ** 0.5)


def save_folder(model: Any, folder: Path, **kwargs: Any) -> Path:
    """Save a transformers model as users have it, with files beside the weights that an export must keep."""
    model.save_pretrained(folder, **kwargs)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}",\n "odd":   1}\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; a value of ... removes the key."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        raw.pop(key, None)
        if value is not ...:
            raw[key] = value
    path.write_text(json.dumps(raw))


def local_store() -> Store:
    """A store; local folders need no options."""
    return open_store()


def load_model(folder: Path, **kwargs: Any) -> Any:
    """Our model with the folder's weights."""
    store = local_store()
    model = build_model(read_config(store, str(folder)), **kwargs)
    load_weights(model, store, str(folder))
    return model


@contextmanager
def single_process() -> Iterator[None]:
    """Megatron-Core's parallel state for a world of one; torn down at the end."""
    World.join()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def token_stream(length: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Random token ids [length]."""
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def plain_pack(sequences: list[Tensor], padding: int = 0) -> Pack:
    """Sequences side by side, each one segment with positions from 0; every token but a sequence's first is a label."""
    segments: list[Segment] = []
    rows: list[Tensor] = []
    owners: list[Tensor] = []
    origins: list[Tensor] = []
    cursor = 0
    for index, sequence in enumerate(sequences):
        size = len(sequence)
        origins.append(torch.full((size,), 3 * (index // 2) + 1 + index % 2))
        segments.append(Segment(cursor, cursor + size))
        rows.append(torch.arange(cursor, cursor + size - 1))
        owners.append(torch.full((size - 1,), index))
        cursor += size
    pad = torch.zeros(padding, dtype=torch.int64)
    return Pack(
        tokens=torch.cat([*sequences, pad]),
        position_ids=torch.cat([*(torch.arange(len(s)) for s in sequences), pad]),
        origins=torch.cat([*origins, pad - 1]),
        segments=tuple(segments),
        rows=torch.cat(rows),
        labels=torch.cat([s[1:] for s in sequences]),
        owners=torch.cat(owners),
        pairs=torch.arange((len(sequences) + 1) // 2),
    )


def shared_pack(pairs: list[tuple[Tensor, Tensor, Tensor]], padding: int = 0) -> Pack:
    """(prompt, chosen, rejected) of each pair in one stream, the prompt once."""
    parts: list[Tensor] = []
    positions: list[Tensor] = []
    origins: list[Tensor] = []
    segments: list[Segment] = []
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    owners: list[Tensor] = []
    cursor = 0
    for index, (prompt, *responses) in enumerate(pairs):
        parent, size = len(segments), len(prompt)
        last = cursor + size - 1
        segments.append(Segment(cursor, cursor + size))
        parts.append(prompt)
        positions.append(torch.arange(size))
        origins.append(torch.full((size,), 3 * index))
        cursor += size
        for side, response in enumerate(responses):
            count = len(response)
            segments.append(Segment(cursor, cursor + count, parent))
            parts.append(response)
            positions.append(torch.arange(size, size + count))
            origins.append(torch.full((count,), 3 * index + 1 + side))
            rows.append(torch.cat([torch.tensor([last]), torch.arange(cursor, cursor + count - 1)]))
            labels.append(response)
            owners.append(torch.full((count,), 2 * index + side))
            cursor += count
    pad = torch.zeros(padding, dtype=torch.int64)
    return Pack(
        tokens=torch.cat([*parts, pad]),
        position_ids=torch.cat([*positions, pad]),
        origins=torch.cat([*origins, pad - 1]),
        segments=tuple(segments),
        rows=torch.cat(rows),
        labels=torch.cat(labels),
        owners=torch.cat(owners),
        pairs=torch.arange(len(pairs)),
    )
