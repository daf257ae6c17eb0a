"""Counts the parameters of a model and of an adapter, as a whole and on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_api.models import FAMILIES, ModelFacts
from dpo_api.models.stages import layers_of_stages
from dpo_api.sizing.layout import Layout
from dpo_api.spec import Lora


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: its layers, and whether it holds the embedding and the LM head."""

    index: int
    layers: range
    first: bool
    last: bool


def stages(layers: int, pipeline: int) -> tuple[Stage, ...]:
    """Return the stages that the layers are divided among, as the trainer does."""
    held = layers_of_stages(layers, pipeline)
    return tuple(Stage(index, own, index == 0, index == pipeline - 1) for index, own in enumerate(held))


def matrices_of_layer(model: ModelFacts) -> int:
    """Parameters of a layer that tensor parallelism divides: q, k, v (and their biases), output, gate, up, down."""
    query, groups = query_width(model), group_width(model)
    qkv = (model.hidden + (1 if model.qkv_bias else 0)) * (query + 2 * groups)
    return qkv + query * model.hidden + (inner_projections(model) + 1) * model.hidden * model.ffn


def norms_of_layer(model: ModelFacts) -> int:
    """Parameters of a layer that every tensor-parallel rank holds: its norms, and those of query and key heads."""
    of_heads = query_width(model) + group_width(model) if model.qk_norm_over_all else 2 * head_width(model)
    return model.norms * norm_parameters(model) + (of_heads if model.qk_norm else 0)


def norm_parameters(model: ModelFacts) -> int:
    """Parameters of a norm over the hidden state: its weight, and its bias."""
    return model.hidden * (2 if model.norm_bias else 1)


def inner_projections(model: ModelFacts) -> int:
    """Projections of the MLP's first layer: gate and up, or up alone."""
    return 2 if model.gated else 1


def head_width(model: ModelFacts) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden // model.heads


def query_width(model: ModelFacts) -> int:
    """Width of all query heads: a."""
    return model.heads * head_width(model)


def group_width(model: ModelFacts) -> int:
    """Width of all key (or value) groups: kv."""
    return model.kv_heads * head_width(model)


def parameters(model: ModelFacts) -> int:
    """Parameters of a whole model, as in its files: tied embeddings count once."""
    tables = model.vocab * model.hidden * (1 if model.tied_embeddings else 2)
    return model.layers * (matrices_of_layer(model) + norms_of_layer(model)) + tables + norm_parameters(model)


def parameters_of_rank(model: ModelFacts, layout: Layout, stage: Stage) -> int:
    """Parameters that a rank of a stage holds.

    Matrices, embedding and LM head are divided by T, the vocabulary rounded up to a multiple of T; norms are not. With
    tied embeddings and more than one stage, the first and the last one hold the table.
    """
    tensor = layout.tensor
    table = -(-model.vocab // tensor) * model.hidden
    count = len(stage.layers) * (-(-matrices_of_layer(model) // tensor) + norms_of_layer(model))
    if stage.first:
        count += table
    if stage.last:
        count += norm_parameters(model)
        count += 0 if model.tied_embeddings and stage.first else table
    return count


def adapter_parts(model: ModelFacts, lora: Lora, module: str) -> int:
    """How many first matrices A an adapter has: one; where PEFT's is continued, one of each of its projections."""
    return len(FAMILIES[model.family].tensors.projections(module)) if lora.continue_adapter else 1


def adapter_shape(model: ModelFacts, module: str) -> tuple[int, int]:
    """Return (inputs, outputs) of the linear layer that an adapter is attached to."""
    query, groups = query_width(model), group_width(model)
    return {
        "attention_qkv": (model.hidden, query + 2 * groups),
        "attention_dense": (query, model.hidden),
        "mlp_fc1": (model.hidden, inner_projections(model) * model.ffn),
        "mlp_fc2": (model.ffn, model.hidden),
    }[module]


def adapter_of_layer(model: ModelFacts, lora: Lora) -> int:
    """Parameters of one layer's adapters: rank x (parts x inputs + outputs) of each module."""
    count = 0
    for module in lora.modules:
        inputs, outputs = adapter_shape(model, module)
        count += lora.rank * (adapter_parts(model, lora, module) * inputs + outputs)
    return count


def adapted(stage: Stage, lora: Lora) -> int:
    """How many layers of a stage have adapters."""
    return len(stage.layers) if lora.layers is None else sum(layer in stage.layers for layer in lora.layers)


def trained_of_rank(model: ModelFacts, lora: Lora | None, layout: Layout, stage: Stage) -> int:
    """Parameters of a rank that are trained: all of them, or its part of the adapters."""
    if lora is None:
        return parameters_of_rank(model, layout, stage)
    return -(-adapted(stage, lora) * adapter_of_layer(model, lora) // layout.tensor)
