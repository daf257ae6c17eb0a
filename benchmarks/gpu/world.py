"""Models, pairs and engines for the phases, without a tokenizer or a download.

Numbers that a golden result depends on come from the bits of PCG64, which are the same in every version of numpy and on
every machine. torch.randn on another processor differs in the last bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
import numpy as np
import torch
from torch import Tensor

from dpo_api.manifest import parse_job
from dpo_api.models import ModelConfig, parse_config
from dpo_api.sizing import layout_of, memory_of
from dpo_api.spec import DPOJobSpec
from dpo_trainer.data.packs.collate import TokenIds, make_pack
from dpo_trainer.data.packs.packing import pack_batch, pair_cost
from dpo_trainer.distributed import World
from dpo_trainer.engine import Engine
from dpo_trainer.model.build import Backend, build_model
from dpo_trainer.model.lora import adapters_disabled, attach_lora
from dpo_trainer.model.pack import Pack
from dpo_trainer.reference import ReferenceTable

Lengths = tuple[int, int, int]
"""Tokens of a pair's prompt, chosen and rejected response."""


def uniform(count: int, seed: int) -> Tensor:
    """Numbers in [-1, 1), fp32 [count], the same bits everywhere: multiples of 2^-23."""
    raw = np.random.PCG64(seed).random_raw(count) >> np.uint64(40)
    return torch.from_numpy(raw.astype(np.int64)).to(torch.float32) * 2.0**-23 - 1.0


def config_of(architecture: str, **sizes: Any) -> ModelConfig:
    """The configuration of a model as its config.json would have it."""
    return parse_config({"architectures": [architecture], "hidden_act": "silu", **sizes}, "config.json")


def llama(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any) -> ModelConfig:
    """A Llama of these sizes."""
    return config_of(
        "LlamaForCausalLM",
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        **more,
    )


class Pairs:
    """Pair i has the lengths of row i, and tokens that depend on its number alone."""

    def __init__(self, lengths: Sequence[Lengths], vocabulary: int) -> None:
        self.lengths, self.vocabulary = lengths, vocabulary

    def tokens(self, pair: int) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Token ids of prompt, chosen and rejected."""
        sizes = self.lengths[pair]
        raw = np.random.PCG64(pair + 1).random_raw(sum(sizes)) % np.uint64(self.vocabulary)
        prompt, chosen, rejected = np.split(raw.astype(np.int32), np.cumsum(sizes)[:-1])
        return prompt, chosen, rejected

    def packs(self, ids: Sequence[int], most_tokens: int, *, share: bool = True, multiple: int = 1) -> list[Pack]:
        """The packs of these pairs, each padded to a multiple."""
        costs = [pair_cost(*self.lengths[pair], share=share) for pair in ids]
        found = pack_batch(costs, most_tokens, None)
        return [
            make_pack(self, [ids[place] for place in pack], share=share, pad_to_multiple=multiple) for pack in found
        ]


def conversation_lengths(count: int, seed: int, most: int) -> list[Lengths]:
    """Lengths like those of chat preferences: prompts of some 160 tokens, responses of some 260, long tails."""
    draw = np.random.default_rng(seed)
    columns = [draw.lognormal(np.log(median), width, count) for median, width in ((160, 0.8), (260, 0.6), (260, 0.6))]
    return [(a, b, c) for a, b, c in np.clip(np.stack(columns, 1), 8, most).astype(int).tolist()]


def spec_of(**sections: Any) -> DPOJobSpec:
    """A spec with these sections; model and data are named and not read."""
    base = {"model": {"huggingFace": {"uri": "model"}}, "data": {"train": [{"uri": "data"}]}}
    head = {"apiVersion": "dpo-operator.dev/v1alpha1", "kind": "DPOJob", "metadata": {"name": "gpu-check"}}
    return parse_job({**head, "spec": {**base, **sections}}).spec


@contextmanager
def alone() -> Iterator[World]:
    """Megatron-Core's groups of one process, on this machine's GPU or CPU."""
    world = World.join()
    try:
        yield world
    finally:
        world.leave()


def model_of(config: ModelConfig, spec: DPOJobSpec, *, exact: bool, seed: int = 1, backend: Backend = "auto") -> Any:
    """A model with random weights, and the spec's adapters. exact: the same weights everywhere, drawn on the CPU."""
    model = build_model(config, precision=spec.training.precision, backend=backend, fp8=spec.transformer_engine.fp8)
    torch.manual_seed(seed)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if exact:
                drawn = uniform(parameter.numel(), 1000 * seed + number).view(parameter.shape)
            else:
                drawn = torch.empty_like(parameter, dtype=torch.float32).uniform_(-1, 1)
            if "norm" in name:
                parameter.copy_(1 + drawn / 4)
            elif parameter.dim() == 1:
                parameter.copy_(drawn / 4)
            else:
                parameter.copy_(drawn * 2.0 ** round(np.log2((3 / parameter.shape[1]) ** 0.5)))
    if spec.lora is not None:
        attach_lora(model, spec.lora, seed=seed)
    return model


@dataclass
class Trained:
    """An engine over synthetic pairs."""

    engine: Engine
    pairs: Pairs
    most_tokens: int
    share: bool = True

    @classmethod
    def of(
        cls, config: ModelConfig, spec: DPOJobSpec, world: World, lengths: Sequence[Lengths], **model: Any
    ) -> "Trained":
        """A new model of the spec, which is not prepared for training yet."""
        engine = Engine(model_of(config, spec, **model), spec, world)
        return cls(engine, Pairs(lengths, config.vocab_size), spec.training.packing.max_tokens or 1024)

    def packs(self, ids: Sequence[int]) -> list[Pack]:
        """The packs of these pairs."""
        return self.pairs.packs(ids, self.most_tokens, share=self.share, multiple=self.engine.spec.pack_multiple)

    def reference(self, ids: Sequence[int]) -> Tensor:
        """Σ log π of both responses with the adapters off: [n, 2] float64."""
        packs = self.packs(ids)
        with adapters_disabled(self.engine.model):
            return self.engine.log_prob_sums(np.asarray(ids), packs)

    def table(self, ids: Sequence[int]) -> ReferenceTable:
        """The reference sums of these pairs."""
        table = ReferenceTable.empty(len(self.pairs.lengths))
        table.sums[torch.as_tensor(ids)] = self.reference(ids)
        return table

    def step(self, ids: Sequence[int], table: ReferenceTable, rate: float = 1e-6) -> dict[str, float]:
        """One optimizer step; the means of its metrics."""
        values, _ = self.engine.train_step(
            np.asarray(ids),
            self.packs(ids),
            lambda pairs: table.of(pairs.cpu()),
            lambda pairs: torch.zeros(len(pairs), 2, dtype=torch.float64),
            rate=rate,
            seed=1,
        )
        return values

    def predicted_bytes(self) -> int:
        """What dpo_api.sizing says that a GPU needs for a step."""
        spec = self.engine.spec
        return memory_of(self.engine._config.facts, spec, layout_of(spec, 1)).total
