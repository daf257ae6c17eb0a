"""Tiny .nemo archives written from NeMo's documented layout, and the same model in plain torch.

Nothing here uses the trainer: the names, the order of rows and the arithmetic are written down once more.
"""

import gzip
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
import yaml
from torch import Tensor

from dpo_testing.corpora import sentencepiece_bytes

HASH = "2053796188904e679f7e2754a2a1f280_"
TOKENIZER = "mt_nlg_plus_multilingual_ja_zh_the_stack_frac_015_256k.model"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Tiny:
    """A model's sizes and features. The defaults are GPT-2B-001's features."""

    vocab: int = 512
    layers: int = 2
    hidden: int = 32
    ffn: int = 40
    heads: int = 4
    positions: int = 256
    norm: str = "layernorm1p"
    activation: str = "fast-swiglu"
    rotary: float = 0.5
    tied: bool = False
    qkv_bias: bool = False
    eps: float = 1e-5
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """model_config.yaml, with the keys that GPT-2B-001's has."""
        return {
            "encoder_seq_length": self.positions,
            "max_position_embeddings": "${.encoder_seq_length}",
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "init_method_std": 0.014,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "kv_channels": None,
            "apply_query_key_layer_scaling": True,
            "normalization": self.norm.removesuffix("1p") if self.norm == "rmsnorm1p" else self.norm,
            "layernorm_zero_centered_gamma": self.norm == "rmsnorm1p",
            "layernorm_epsilon": self.eps,
            "make_vocab_size_divisible_by": 128,
            "position_embedding_type": "rope",
            "rotary_percentage": self.rotary,
            "bias": False,
            "qkv_bias": self.qkv_bias,
            "activation": self.activation,
            "share_embeddings_and_output_weights": self.tied,
            "transformer_engine": False,
            "megatron_amp_O2": False,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "tokenizer": {
                "library": "sentencepiece",
                "type": None,
                "model": f"nemo:{HASH}{TOKENIZER}",
                "tokenizer_model": f"nemo:{HASH}{TOKENIZER}",
                "sentencepiece_legacy": False,
            },
            **self.more,
        }


GPT_2B = Tiny()
LLAMA = Tiny(norm="rmsnorm", rotary=1.0)
NEMOTRON = Tiny(activation="squared-relu")


def state(tiny: Tiny, seed: int = 0) -> State:
    """The whole model's state dict in the layout before Megatron-Core, every value random."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        found: Tensor = torch.randn(rows, columns, generator=draw) * (scale / columns**0.5)
        return found

    def norm(name: str) -> State:
        around = 0.0 if tiny.norm.endswith("1p") else 1.0
        found = {f"{name}.weight": around + 0.3 * torch.randn(tiny.hidden, generator=draw)}
        if not tiny.norm.startswith("rmsnorm"):
            found[f"{name}.bias"] = 0.5 * torch.randn(tiny.hidden, generator=draw)
        return found

    h, f = tiny.hidden, tiny.ffn
    found = {"model.language_model.embedding.word_embeddings.weight": matrix(tiny.vocab, h, 1.2)}
    wide = 1 if tiny.activation == "squared-relu" else 2
    for layer in range(tiny.layers):
        name = f"model.language_model.encoder.layers.{layer}"
        found |= norm(f"{name}.input_layernorm")
        found[f"{name}.self_attention.query_key_value.weight"] = matrix(3 * h, h)
        if tiny.qkv_bias:
            found[f"{name}.self_attention.query_key_value.bias"] = 0.5 * torch.randn(3 * h, generator=draw)
        found[f"{name}.self_attention.dense.weight"] = matrix(h, h)
        found |= norm(f"{name}.post_attention_layernorm")
        found[f"{name}.mlp.dense_h_to_4h.weight"] = matrix(wide * f, h)
        found[f"{name}.mlp.dense_4h_to_h.weight"] = matrix(h, f)
    found |= norm("model.language_model.encoder.final_layernorm")
    if not tiny.tied:
        found["model.language_model.output_layer.weight"] = matrix(tiny.vocab, h, 1.2)
    found["model.language_model.rotary_pos_emb.inv_freq"] = torch.ones(4)
    return found


def logits(tiny: Tiny, weights: State, tokens: Tensor) -> Tensor:
    """[S] token ids → [S, vocab], as NeMo computes them from this state dict."""
    get = {name.removeprefix("model.language_model."): value.float() for name, value in weights.items()}
    a, d = tiny.heads, tiny.hidden // tiny.heads
    turned = int(d * tiny.rotary)
    places = torch.arange(len(tokens)) / tiny.more.get("seq_len_interpolation_factor", 1.0)
    angles = places[:, None] / 10000 ** (torch.arange(0, turned, 2) / turned)
    cosines, sines = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)

    def norm(x: Tensor, name: str) -> Tensor:
        weight = get[f"{name}.weight"]
        weight = weight + 1 if tiny.norm.endswith("1p") else weight
        if tiny.norm.startswith("rmsnorm"):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + tiny.eps) * weight
        return F.layer_norm(x, (tiny.hidden,), weight, get[f"{name}.bias"], tiny.eps)

    def rotate(x: Tensor) -> Tensor:  # [S, heads, d]
        part, rest = x[..., :turned], x[..., turned:]
        first, second = part.chunk(2, -1)
        return torch.cat([part * cosines[:, None] + torch.cat([-second, first], -1) * sines[:, None], rest], -1)

    x = get["embedding.word_embeddings.weight"][tokens]
    unseen = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for layer in range(tiny.layers):
        name = f"encoder.layers.{layer}"
        fused = norm(x, f"{name}.input_layernorm") @ get[f"{name}.self_attention.query_key_value.weight"].T
        if tiny.qkv_bias:
            fused = fused + get[f"{name}.self_attention.query_key_value.bias"]
        q, k, v = fused.view(len(tokens), a, 3 * d).chunk(3, -1)
        scores = torch.einsum("sad,tad->ast", rotate(q), rotate(k)) / d**0.5
        weights_of = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        seen = torch.einsum("ast,tad->sad", weights_of, v).reshape(len(tokens), -1)
        x = x + seen @ get[f"{name}.self_attention.dense.weight"].T
        inner = norm(x, f"{name}.post_attention_layernorm") @ get[f"{name}.mlp.dense_h_to_4h.weight"].T
        if tiny.activation == "squared-relu":
            inner = inner.relu().square()
        else:
            first, second = inner.chunk(2, -1)
            inner = F.silu(first) * second
        x = x + inner @ get[f"{name}.mlp.dense_4h_to_h.weight"].T
    head = get["embedding.word_embeddings.weight" if tiny.tied else "output_layer.weight"]
    return norm(x, "encoder.final_layernorm") @ head.T


def divided(tiny: Tiny, weights: State, tensor: int, pipeline: int) -> dict[tuple[int, int], State]:
    """(tensor-parallel rank, stage) → what NeMo saves for it: layers counted from 0, gate and up of a rank together."""
    found: dict[tuple[int, int], State] = {(t, p): {} for t in range(tensor) for p in range(pipeline)}
    each = tiny.layers // pipeline
    for name, value in weights.items():
        if ".layers." in name:
            head, _, tail = name.partition(".layers.")
            number, _, rest = tail.partition(".")
            stage, local = divmod(int(number), each)
            stages, own = [stage], f"{head}.layers.{local}.{rest}"
        else:
            stages, own = ([0] if "embedding" in name else [pipeline - 1]), name
        for t in range(tensor):
            for stage in stages:
                found[t, stage][own] = _share(tiny, name, value, t, tensor).clone()
    if tiny.tied and pipeline > 1:  # the last stage's copy
        for t in range(tensor):
            key = "model.language_model.embedding.word_embeddings.weight"
            found[t, pipeline - 1]["model.word_embeddings.weight"] = found[t, 0][key].clone()
    return found


def _share(tiny: Tiny, name: str, value: Tensor, rank: int, size: int) -> Tensor:
    if "layernorm" in name or "rotary" in name:
        return value
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
        return value.chunk(size, 1)[rank]
    if "dense_h_to_4h" in name and tiny.activation == "fast-swiglu":
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    return value.chunk(size)[rank]


def saved(value: Any) -> bytes:
    """The bytes of ``torch.save``."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def content(tiny: Tiny, weights: State, *, tensor: int = 1, pipeline: int = 1) -> dict[str, bytes]:
    """The archive's members."""
    config = {**tiny.config, "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    members = {
        HASH + TOKENIZER: sentencepiece_bytes(tiny.vocab - 12),
        "model_config.yaml": yaml.safe_dump(config).encode(),
    }
    for (t, p), part in divided(tiny, weights, tensor, pipeline).items():
        ranks = f"tp_rank_{t:02d}_pp_rank_{p:03d}/" if pipeline > 1 else f"mp_rank_{t:02d}/" if tensor > 1 else ""
        members[f"{ranks}model_weights.ckpt"] = saved(part)
    return members


def write(path: Path, members: Mapping[str, bytes], *, prefix: str = "./", compressed: bool = False) -> Path:
    """Pack an archive as NeMo does: ``./`` and ``./NAME``, without compression since NeMo 1.7."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        if prefix:
            folder = tarfile.TarInfo(".")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(out.getvalue()) if compressed else out.getvalue())
    return path


def unpack(folder: Path, members: Mapping[str, bytes]) -> Path:
    """Write the members as files of a folder."""
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


__all__ = ["GPT_2B", "LLAMA", "Tiny", "content", "divided", "logits", "replace", "saved", "state", "unpack", "write"]
