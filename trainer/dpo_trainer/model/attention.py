"""Attention over a pack: rotary embedding, then one attention call over the sequences of its plan."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dpo_trainer.model.attend import attend
from dpo_trainer.model.context import gathered, plan_of_pack
from dpo_trainer.model.pack import Pack
from dpo_trainer.model.rotary import rotate, rotate_and_spread, rotation
from dpo_trainer.model.varlen import VarlenPlan, spread


@dataclass(kw_only=True)
class PackContext(PackedSeqParams):
    """A pack passed through Megatron-Core, which gives ``packed_seq_params`` to every layer's attention.

    Each call carries it, so activation recomputation and pipeline stages see it too. ``qkv_format`` is not one of
    Megatron-Core's, so only PackAttention interprets it.
    """

    pack: Pack
    frequencies: Tensor  # fp32 [ropes, rotary_dim / 2]
    factors: tuple[float, ...] = (1.0,)  # of each rope's rotated queries and keys

    def __post_init__(self) -> None:
        self.qkv_format = "pack"
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def plan(self) -> VarlenPlan:
        """The pack's plan, or one that is made here if it came without (``transfer.loaded``)."""
        return self.pack.plan or plan_of_pack(self.pack).to(self.pack.tokens.device)

    def rotation(self, rope: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every token's position, computed once."""
        if rope not in self._rotations:
            self._rotations[rope] = rotation(self.pack.position_ids, self.frequencies[rope], self.factors[rope])
        return self._rotations[rope]


class PackAttention(torch.nn.Module):
    """Megatron-Core's ``core_attention``: rotary embedding, then softmax(QKᵀ/√d)V inside the pack's segments.

    Built by the layer spec. ``windows`` holds the window of each layer (0-based), None where it sees everything;
    ``ropes`` which of the rotary embeddings each layer has, None if it has none.
    """

    def __init__(
        self,
        config: Any,  # noqa: ARG002 - the pack says how it is divided
        layer_number: int,
        attn_mask_type: Any,  # noqa: ARG002 - the pack's segments say what is causal
        attention_type: str,  # noqa: ARG002 - always self-attention here
        windows: tuple[int | None, ...] = (),
        ropes: tuple[int | None, ...] = (),
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        self.window = windows[layer_number - 1]
        self.rope = ropes[layer_number - 1]
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
        queries, keys, values = (part.squeeze(1) for part in (query, key, value))
        values = spread(gathered(values, context.pack), context.plan)
        if self.rope is not None:
            cosines, sines = context.rotation(self.rope)
            queries = rotate(queries, cosines, sines)
            if context.pack.context_size == 1:
                keys = rotate_and_spread(keys, cosines, sines, context.plan)
            else:
                keys = spread(gathered(rotate(keys, cosines, sines), context.pack), context.plan)
        else:
            keys = spread(gathered(keys, context.pack), context.plan)
        return attend(queries, keys, values, context.plan, self.window, self.softmax_scale).unsqueeze(1)
