"""How Hugging Face's tensors map onto this rank's part of Megatron-Core's parameters, both ways.

Symbols: H hidden, a heads, g key/value groups, n = a/g, d head size, F MLP width, V vocabulary, T tensor-parallel size,
t tensor-parallel rank. Megatron-Core fuses q, k and v into rows ordered by group (n·d rows of queries, d of keys, d of
values) and gate and up into one matrix, gate first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from dpo_api.models import ModelConfig

Read = Callable[[str, tuple[int, int] | None], Tensor]
"""Read a Hugging Face tensor, or its rows [start, end): ``read(name, (start, end))``."""

Value = Callable[[str, Tensor], Tensor]
"""(parameter name, parameter) → the value to write: a LoRA merge or an fp32 master in place of the parameter."""

Kind = Literal["copy", "rows", "columns", "qkv", "gated"]
"""How a parameter is divided over tensor-parallel ranks, and what it is made of."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One Megatron-Core parameter and the Hugging Face tensors that it is made of."""

    kind: Kind
    parameter: str  #: name in this pipeline stage's state_dict()
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  #: of the whole Hugging Face tensors
    duplicate: bool = False  #: another stage has the parameter too, and exports it

    @property
    def fused(self) -> bool:
        """Whether the parts of a "qkv" or "gated" parameter are rows of one Hugging Face tensor, one after another."""
        return self.kind in ("qkv", "gated") and len(self.sources) == 1


def slots(config: ModelConfig, layers: Sequence[int], *, first: bool, last: bool) -> Iterator[Slot]:
    """Every parameter of a pipeline stage that holds the global ``layers``, the embedding if ``first``, the head if
    ``last``, in the model's order."""
    h, names = config.hidden_size, config.row.tensors
    embedding = Slot(
        "rows", "embedding.word_embeddings.weight", (f"{names.embedding}.weight",), ((config.vocab_size, h),)
    )
    # With tied weights Megatron-Core keeps a copy of the embedding for the head on the last of several stages.
    if first:
        yield embedding
    for local, layer in enumerate(layers):
        yield from _layer(config, f"decoder.layers.{local}", names.layer(layer))
    if last:
        yield from _norm(config, "decoder.final_layernorm", names.final_norm)
        if not config.tied_embeddings:
            yield Slot("rows", "output_layer.weight", (f"{names.head}.weight",), ((config.vocab_size, h),))
        elif not first:
            yield replace(embedding, parameter="output_layer.weight", duplicate=True)


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Slot]:
    """The parameters of one layer. ours, theirs: the prefixes of its names."""
    h, f, d = config.hidden_size, config.ffn_hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_query_groups * d
    names = config.row.tensors
    before, after = config.norm_places != "after", config.norm_places != "before"
    if before:
        yield from _norm(config, f"{ours}.input_layernorm", f"{theirs}.{names.attention_norm}")
    rows = (q, kv, kv) if len(names.qkv) > 1 else (q + 2 * kv,)
    weights, biases = (tuple(f"{theirs}.{name}.{kind}" for name in names.qkv) for kind in ("weight", "bias"))
    yield Slot("qkv", f"{ours}.self_attention.linear_qkv.weight", weights, tuple((count, h) for count in rows))
    if config.qkv_bias:
        yield Slot("qkv", f"{ours}.self_attention.linear_qkv.bias", biases, tuple((count,) for count in rows))
    if config.qk_norm:
        widths = (q, kv) if config.qk_norm_over_all else (d, d)
        for part, name, width in zip("qk", names.qk_norm, widths, strict=True):
            of_heads = f"{ours}.self_attention.{part}_layernorm.weight"
            yield Slot("copy", of_heads, (f"{theirs}.{name}.weight",), ((width,),))
    output = f"{theirs}.{names.attention_output}.weight"
    yield Slot("columns", f"{ours}.self_attention.linear_proj.weight", (output,), ((h, q),))
    if after:
        yield from _norm(config, f"{ours}.self_attn_bda.norm", f"{theirs}.{names.attention_norm_after}")
    if before:
        yield from _norm(config, f"{ours}.pre_mlp_layernorm", f"{theirs}.{names.mlp_norm}")
    kind: Kind = "gated" if config.gated else "rows"
    into = tuple(f"{theirs}.{name}.weight" for name in names.gate_up)
    whole_rows = f * (2 if config.gated else 1)
    yield Slot(kind, f"{ours}.mlp.linear_fc1.weight", into, ((whole_rows // len(into), h),) * len(into))
    yield Slot("columns", f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.{names.down}.weight",), ((h, f),))
    if after:
        yield from _norm(config, f"{ours}.mlp_bda.norm", f"{theirs}.{names.mlp_norm_after}")


def _norm(config: ModelConfig, ours: str, theirs: str) -> Iterator[Slot]:
    for kind in ("weight", "bias") if config.norm_bias else ("weight",):
        yield Slot("copy", f"{ours}.{kind}", (f"{theirs}.{kind}",), ((config.hidden_size,),))


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a Hugging Face tensor that a tensor-parallel rank holds, and where they are in its parameter."""

    source: int  #: index of the tensor in ``Slot.sources``
    first: int
    last: int  #: the tensor's rows [first, last)
    row: int  #: of the parameter, where they begin
    columns: tuple[int, int] | None = None  #: of the tensor; None: all


def pieces(slot: Slot, config: ModelConfig, rank: int, size: int) -> list[Piece]:
    """Return what this tensor-parallel rank holds of a slot. Rows of its parameter that no piece fills are zero."""
    rows = slot.shapes[0][0]
    if slot.kind == "copy":
        return [Piece(0, 0, rows, 0)]
    if slot.kind == "rows":  # ⌈V/T⌉ rows of an embedding or a head, F/T of an MLP without a gate
        each = -(-rows // size)
        return [Piece(0, min(rank * each, rows), min((rank + 1) * each, rows), 0)]
    if slot.kind == "columns":
        return [Piece(0, 0, rows, 0, _share(slot.shapes[0][1], rank, size))]
    if slot.kind == "gated":
        first, last = _share(config.ffn_hidden_size, rank, size)
        found = [Piece(part, first, last, part * (last - first)) for part in range(2)]
    else:
        found = _pieces_qkv(config, rank, size)
    if not slot.fused:
        return found
    counts = _rows_of_parts(slot, config)
    starts = [sum(counts[:part]) for part in range(len(counts))]
    return [replace(p, source=0, first=p.first + starts[p.source], last=p.last + starts[p.source]) for p in found]


def _rows_of_parts(slot: Slot, config: ModelConfig) -> tuple[int, ...]:
    """Rows of q, k and v, or of the gate and the up projection."""
    if slot.kind == "gated":
        return (config.ffn_hidden_size,) * 2
    return tuple(heads * config.head_dim for heads in (config.num_attention_heads, *(config.num_query_groups,) * 2))


def _pieces_qkv(config: ModelConfig, rank: int, size: int) -> list[Piece]:
    g, d = config.num_query_groups, config.head_dim
    n = config.num_attention_heads // g
    each = (n + 2) * d  # rows of a group: its queries, keys and values
    # Where several ranks share a group, its rows are cut without regard to queries, keys and values.
    begin, end = rank * g * each // size, (rank + 1) * g * each // size
    found: list[Piece] = []
    for group in range(begin // each, -(-end // each)):
        row = group * each
        for source, count in enumerate((n * d, d, d)):
            first, last = max(row, begin), min(row + count, end)
            if first < last:
                within = group * count - row  # from a row of the fused matrix to a row of the source
                found.append(Piece(source, first + within, last + within, first - begin))
            row += count
    return found


def place(held: Sequence[Piece], parameter: Tensor, source: int, block: Tensor, first: int) -> None:
    """Copy into ``parameter`` what this rank holds of ``block``, rows of a source from ``first`` on."""
    for piece in held:
        low, high = max(piece.first, first), min(piece.last, first + len(block))
        if piece.source != source or low >= high:
            continue
        rows = block[low - first : high - first]
        if piece.columns is not None:
            rows = rows[:, piece.columns[0] : piece.columns[1]]
        at = piece.row + low - piece.first
        parameter[at : at + high - low].copy_(rows)


def assemble(slot: Slot, config: ModelConfig, read: Read, rank: int, size: int) -> Tensor:
    """Return this tensor-parallel rank's part of the parameter, from slices of Hugging Face tensors."""
    held = pieces(slot, config, rank, size)
    blocks = [read(slot.sources[piece.source], (piece.first, piece.last)) for piece in held]
    rows, columns = sum(shape[0] for shape in slot.shapes), list(slot.shapes[0][1:])
    if slot.kind == "columns":
        columns = [columns[0] // size]
    elif slot.kind != "copy":
        rows = -(-rows // size)
    if len(blocks) == 1 and blocks[0].shape == (rows, *columns):
        return blocks[0]
    part = torch.zeros(rows, *columns, dtype=reduce(torch.promote_types, (block.dtype for block in blocks)))
    for piece, block in zip(held, blocks, strict=True):
        place([piece], part, piece.source, block, piece.first)
    return part


def zero_padding(slot: Slot, held: Sequence[Piece], parameter: Tensor) -> None:
    """Set the rows of an embedding or a head beyond the vocabulary to zero."""
    if slot.kind == "rows":
        parameter[held[0].last - held[0].first :].zero_()


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
        parts = split_qkv(whole, config)
        return (torch.cat(parts),) if slot.fused else parts
    if slot.kind == "gated" and not slot.fused:
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
