"""Attention over a pack: one call per run of tokens, without a mask over the whole stream.

A prompt and the response that follows it are one causal call. Every other response is one call of its queries against
the keys of its parent and its own. So the FLOPs depend on the pairs, not on the length of the pack.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dpo_trainer.model.pack import Pack, Segment
from dpo_trainer.model.rotary import rotate, rotation


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) of the stream, handled by one attention call.

    ``keys_from``: None for a causal call over the piece itself; else the index of the piece that holds the parent,
    whose tokens [parent_start, parent_end) are attended wholly. ``padding``: belongs to no segment, gets zeros.
    """

    start: int
    end: int
    keys_from: int | None = None
    parent_start: int = 0
    parent_end: int = 0
    padding: bool = False

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.start


def pieces_of(segments: tuple[Segment, ...], size: int) -> tuple[Piece, ...]:
    """Cut a stream of ``size`` tokens into attention calls, in the stream's order and without gaps."""
    pieces: list[Piece] = []
    home: dict[int, int] = {}  # segment → the piece that holds it
    cursor, index = 0, 0
    while index < len(segments):
        segment = segments[index]
        if segment.start > cursor:
            pieces.append(Piece(cursor, segment.start, padding=True))
        home[index] = len(pieces)
        if segment.parent is None:
            end = segment.end
            follower = segments[index + 1] if index + 1 < len(segments) else None
            if follower is not None and follower.parent == index and follower.start == end:
                # One causal call over both is right for the parent and for its first child.
                index += 1
                home[index] = len(pieces)
                end = follower.end
            pieces.append(Piece(segment.start, end))
        else:
            parent = segments[segment.parent]
            pieces.append(Piece(segment.start, segment.end, home[segment.parent], parent.start, parent.end))
        cursor = pieces[-1].end
        index += 1
    if cursor < size:
        pieces.append(Piece(cursor, size, padding=True))
    return tuple(pieces)


@dataclass(kw_only=True)
class PackContext(PackedSeqParams):
    """A pack passed through Megatron-Core, which gives ``packed_seq_params`` to every layer's attention.

    Each call carries it, so activation recomputation and pipeline stages see it too. ``qkv_format`` is not one of
    Megatron-Core's, so only PackAttention interprets it.
    """

    pack: Pack
    frequencies: Tensor  # fp32 [head_dim / 2]
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.qkv_format = "pack"

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The pack's attention calls."""
        return pieces_of(self.pack.segments, self.pack.length)

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every token's position."""
        return rotation(self.pack.position_ids, self.frequencies)

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """Which keys each query of the ``index``-th piece may see, bool [queries, keys]; None means causal."""
        piece = self.pieces[index]
        keys = piece.length + piece.parent_end - piece.parent_start
        if window is not None and keys <= window:
            window = None
        if piece.keys_from is None and window is None:
            return None
        found = self.masks.get((index, window))
        if found is None:
            found = self.masks[index, window] = self._make_mask(piece, window)
        return found

    def _make_mask(self, piece: Piece, window: int | None) -> Tensor:
        positions = self.pack.position_ids
        own = positions[piece.start : piece.end]
        keys = torch.cat((positions[piece.parent_start : piece.parent_end], own))
        parents = keys.shape[0] - piece.length
        visible = torch.ones(piece.length, keys.shape[0], dtype=torch.bool, device=keys.device).tril(diagonal=parents)
        if window is not None:
            visible &= own[:, None] - keys[None, :] < window
        return visible


class PackAttention(torch.nn.Module):
    """Megatron-Core's ``core_attention``: rotary embedding, then softmax(QKᵀ/√d)V inside the pack's segments.

    Built by the layer spec. ``windows`` holds the window of each layer (0-based), None where it sees everything.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,  # noqa: ARG002 - the pack's segments say what is causal
        attention_type: str,  # noqa: ARG002 - always self-attention here
        windows: tuple[int | None, ...] = (),
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError("PackAttention does not split a sequence over context-parallel ranks")
        self.window = windows[layer_number - 1]
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG002 - the pack's segments are the mask
        /,
        *,
        packed_seq_params: PackContext,
        **_unused: Any,
    ) -> Tensor:
        """Attend inside the pack.

        query: [S, 1, heads, d]; key, value: [S, 1, groups, d], before rotary embedding. Returns [S, 1, heads · d], zero
        for padding.
        """
        context = packed_seq_params
        cosines, sines = context.rotation
        pieces = context.pieces
        lengths = [piece.length for piece in pieces]
        # split's backward is one concatenation; slicing's would write a whole zero stream for every piece.
        queries = torch.split(rotate(query.squeeze(1), cosines, sines), lengths)
        keys = torch.split(rotate(key.squeeze(1), cosines, sines), lengths)
        values = torch.split(value.squeeze(1), lengths)
        heads = query.shape[2] * query.shape[3]
        outputs: list[Tensor] = []
        for index, piece in enumerate(pieces):
            if piece.padding:
                outputs.append(query.new_zeros(piece.length, heads))
                continue
            k, v = keys[index], values[index]
            if piece.keys_from is not None:
                base = pieces[piece.keys_from].start
                parent = slice(piece.parent_start - base, piece.parent_end - base)
                k = torch.cat((keys[piece.keys_from][parent], k))
                v = torch.cat((values[piece.keys_from][parent], v))
            outputs.append(self._attend(queries[index], k, v, context.mask(index, self.window)))
        return torch.cat(outputs).unsqueeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """One call: query [L, heads, d]; key, value [K, groups, d]; mask bool [L, K], None for causal.

        Returns [L, heads · d].
        """
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],  # [1, heads, L, d]
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[0].transpose(0, 1).flatten(1)  # [L, heads · d]
