"""The log-probs of a few tokens, by a model that is never in memory as a whole: its parameters come layer by layer.

The modules are those of training: Megatron-Core's GPTModel of all layers, whose matrices have no memory of their own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from dpo_api.models import ModelConfig
from dpo_trainer.model.attention import PackContext
from dpo_trainer.model.build import build_model
from dpo_trainer.model.forward import scaled_for_head
from dpo_trainer.model.pack import Pack, Segment

TOKENS = 16


def check_pack(config: ModelConfig) -> Pack:
    """Return one sequence of fixed tokens, each but the first a label.

    Its positions lie close together at first, and then further and further apart, up to the last one that the model
    was made for: so a few tokens show a wrong rotary embedding, also in channels that turn slowly.
    """
    places = torch.arange(TOKENS)
    tokens = (places * 7919 + 3) % config.vocab_size
    spread = max(config.max_positions, TOKENS) ** (places.double() / (TOKENS - 1)) - 1
    position_ids = torch.maximum(places, spread.long())
    return Pack(
        tokens=tokens,
        position_ids=position_ids,
        origins=torch.ones_like(tokens),
        segments=(Segment(0, TOKENS),),
        rows=places[:-1],
        labels=tokens[1:],
        owners=torch.zeros_like(tokens[1:]),
        pairs=torch.zeros(1, dtype=torch.int64),
    )


class Forward:
    """One model's forward pass in fp32 on the CPU. Call its methods in the order in which they are here.

    Needs ``parallel_state`` of one process.
    """

    def __init__(self, config: ModelConfig, pack: Pack) -> None:
        self._pack = pack
        self._gpt = build_model(config, backend="local", empty=True).eval()
        self._context = PackContext(pack=pack, frequencies=self._gpt.rope_frequencies, factors=self._gpt.rope_factors)
        self._hidden = torch.empty(0)
        self._logits: list[Tensor] = []

    @torch.no_grad()
    def embed(self, rows: Tensor) -> None:
        """rows: [S, H] fp32, the embedding of each token of the pack."""
        places = torch.arange(len(rows))[None]
        parameters = {"word_embeddings.weight": rows}
        self._hidden = functional_call(self._gpt.embedding, parameters, (places, self._pack.position_ids[None]))

    @torch.no_grad()
    def module(self, layer: int | None, parameters: Mapping[str, Tensor]) -> None:
        """Run the layer of this number, from 0, or for None the final norm.

        parameters: fp32, by their names in the layer or norm.
        """
        if layer is not None:
            words = {"hidden_states": self._hidden, "attention_mask": None, "packed_seq_params": self._context}
            self._hidden, _ = functional_call(self._gpt.decoder.layers[layer], dict(parameters), (), words)
            return
        hidden = functional_call(self._gpt.decoder.final_layernorm, dict(parameters), (self._hidden,))
        self._hidden = scaled_for_head(self._gpt, hidden.squeeze(1).index_select(0, self._pack.rows))

    @torch.no_grad()
    def head(self, rows: Tensor) -> None:
        """rows: [v, H] fp32, the next rows of the LM head."""
        self._logits.append(self._hidden @ rows.t())

    def log_probs(self) -> Tensor:
        """Return log softmax(logits)[label] of each label of the pack, fp32 [R]."""
        found = torch.log_softmax(torch.cat(self._logits, 1), 1)
        return found.gather(1, self._pack.labels[:, None]).squeeze(1)
