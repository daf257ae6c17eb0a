"""How Hugging Face's tensors map onto this rank's part of Megatron-Core's parameters, both ways.

Symbols: H hidden, a heads, g key/value groups, n = a/g, d head size, F MLP width, V vocabulary, T tensor-parallel size,
t tensor-parallel rank. Megatron-Core fuses q, k and v into rows ordered by group (n·d rows of queries, d of keys, d of
values) and gate and up into one matrix, gate first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from dpo_api.models import ModelConfig

Read = Callable[[str, tuple[int, int] | None], Tensor]
"""Read a Hugging Face tensor, or its rows [start, end): ``read(name, (start, end))``."""

Value = Callable[[str, Tensor], Tensor]
"""(parameter name, parameter) → the value to write: a LoRA merge or an fp32 master in place of the parameter."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One Megatron-Core parameter and the Hugging Face tensors that it is made of."""

    kind: Literal["copy", "rows", "columns", "qkv", "gated"]
    parameter: str  #: name in this pipeline stage's state_dict()
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  #: of the whole Hugging Face tensors
    duplicate: bool = False  #: another stage has the parameter too, and exports it


def slots(config: ModelConfig, layers: Sequence[int], *, first: bool, last: bool) -> Iterator[Slot]:
    """Every parameter of a pipeline stage that holds the global ``layers``, the embedding if ``first``, the head if
    ``last``, in the model's order."""
    h, f, d = config.hidden_size, config.ffn_hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_query_groups * d
    names = config.row.tensors
    embedding = Slot(
        "rows", "embedding.word_embeddings.weight", (f"{names.embedding}.weight",), ((config.vocab_size, h),)
    )
    # With tied weights Megatron-Core keeps a copy of the embedding for the head on the last of several stages.
    if first:
        yield embedding
    for local, layer in enumerate(layers):
        ours, theirs = f"decoder.layers.{local}", names.layer(layer)
        yield Slot("copy", f"{ours}.input_layernorm.weight", (f"{theirs}.{names.attention_norm}.weight",), ((h,),))
        weights, biases = (tuple(f"{theirs}.{name}.{kind}" for name in names.qkv) for kind in ("weight", "bias"))
        yield Slot("qkv", f"{ours}.self_attention.linear_qkv.weight", weights, ((q, h), (kv, h), (kv, h)))
        if config.qkv_bias:
            yield Slot("qkv", f"{ours}.self_attention.linear_qkv.bias", biases, ((q,), (kv,), (kv,)))
        if config.qk_norm:
            for part, name in zip("qk", names.qk_norm, strict=True):
                norm = f"{ours}.self_attention.{part}_layernorm.weight"
                yield Slot("copy", norm, (f"{theirs}.{name}.weight",), ((d,),))
        output = f"{theirs}.{names.attention_output}.weight"
        yield Slot("columns", f"{ours}.self_attention.linear_proj.weight", (output,), ((h, q),))
        yield Slot("copy", f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.{names.mlp_norm}.weight",), ((h,),))
        gated = tuple(f"{theirs}.{name}.weight" for name in names.gate_up)
        yield Slot("gated", f"{ours}.mlp.linear_fc1.weight", gated, ((f, h), (f, h)))
        yield Slot("columns", f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.{names.down}.weight",), ((h, f),))
    if last:
        yield Slot("copy", "decoder.final_layernorm.weight", (f"{names.final_norm}.weight",), ((h,),))
        if not config.tied_embeddings:
            yield Slot("rows", "output_layer.weight", (f"{names.head}.weight",), ((config.vocab_size, h),))
        elif not first:
            yield replace(embedding, parameter="output_layer.weight", duplicate=True)


def assemble(slot: Slot, config: ModelConfig, read: Read, rank: int, size: int) -> Tensor:
    """Return this tensor-parallel rank's part of the parameter, from whole or sliced Hugging Face tensors."""
    if slot.kind == "copy":
        return read(slot.sources[0], None)
    if slot.kind == "rows":
        return _padded_rows(slot, read, rank, size)
    if slot.kind == "columns":
        first, last = _share(slot.shapes[0][1], rank, size)
        return read(slot.sources[0], None)[:, first:last]
    if slot.kind == "gated":
        rows = _share(slot.shapes[0][0], rank, size)
        return torch.cat([read(name, rows) for name in slot.sources])
    return _assemble_qkv(slot, config, read, rank, size)


def _padded_rows(slot: Slot, read: Read, rank: int, size: int) -> Tensor:
    """This rank's ⌈V/T⌉ rows of an embedding or a head: zeros after the last real one."""
    rows = slot.shapes[0][0]
    each = -(-rows // size)
    first, last = min(rank * each, rows), min((rank + 1) * each, rows)
    real = read(slot.sources[0], (first, last))
    return real if last - first == each else F.pad(real, (0, 0, 0, each - (last - first)))


def _assemble_qkv(slot: Slot, config: ModelConfig, read: Read, rank: int, size: int) -> Tensor:
    g, d = config.num_query_groups, config.head_dim
    n = config.num_attention_heads // g
    if size <= g:
        first, last = _share(g, rank, size)
    else:  # several ranks share a group: its rows are cut without regard to queries, keys and values
        first = rank // (size // g)
        last = first + 1
    q = read(slot.sources[0], (first * n * d, last * n * d))
    k = read(slot.sources[1], (first * d, last * d))
    v = read(slot.sources[2], (first * d, last * d))
    groups = last - first
    tail = q.shape[1:]  # (H,) for the weight, () for the bias
    parts = [q.view(groups, n * d, *tail), k.view(groups, d, *tail), v.view(groups, d, *tail)]
    fused = torch.cat(parts, dim=1).view(-1, *tail)  # [groups · (n+2) · d, …]
    if size <= g:
        return fused
    cut = _share(fused.shape[0], rank % (size // g), size // g)
    return fused[cut[0] : cut[1]]


def split_qkv(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The q, k and v rows of a whole fused matrix [(a+2g)·d, …]: [a·d, …], [g·d, …], [g·d, …]."""
    g, d = config.num_query_groups, config.head_dim
    n = config.num_attention_heads // g
    tail = fused.shape[1:]
    grouped = fused.view(g, n + 2, d, *tail)
    q, k, v = grouped[:, :n], grouped[:, n], grouped[:, n + 1]
    return q.reshape(-1, *tail), k.reshape(-1, *tail), v.reshape(-1, *tail)


def dissolve(slot: Slot, whole: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Split a whole (not split over ranks) parameter into Hugging Face's tensors, in the order of ``slot.sources``."""
    if slot.kind == "qkv":
        return split_qkv(whole, config)
    if slot.kind == "gated":
        return tuple(whole.chunk(2))
    if slot.kind == "rows":
        return (whole[: slot.shapes[0][0]],)  # without the padding
    return (whole,)


def whole(slot_kind: str, shards: list[Tensor]) -> Tensor:
    """Put the tensor-parallel ranks' parts of one parameter together."""
    if len(shards) == 1 or slot_kind == "copy":
        return shards[0]
    if slot_kind == "columns":
        return torch.cat(shards, dim=1)
    if slot_kind == "gated":  # each rank holds [gate_t ; up_t]
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(shards)


def target(model: Any, slot: Slot) -> Tensor:
    """Return the parameter of ``model`` that a slot describes."""
    parameter: Tensor = model.get_parameter(slot.parameter)
    return parameter


def _share(count: int, rank: int, size: int) -> tuple[int, int]:
    return rank * count // size, (rank + 1) * count // size
