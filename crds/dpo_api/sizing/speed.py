"""Predicts the seconds of one step, only to compare layouts with each other.

Counted: matrix products at an assumed efficiency, the pipeline's bubble, what recomputation repeats, and the bytes that
ranks send over NVLink and the network, one after the other. Not counted, because they are much the same in every
layout: the quadratic part of attention, elementwise work, the optimizer's arithmetic, and the overlap of sending with
computing.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_api.models import ModelFacts
from dpo_api.sizing.flops import head_flops, passes
from dpo_api.sizing.layout import Layout
from dpo_api.sizing.memory import key_width, value_bytes
from dpo_api.sizing.parameters import Stage, matrices_of_layer, stages, trained_of_rank
from dpo_api.sizing.products import Product
from dpo_api.spec import DPOJobSpec

EFFICIENCY = 0.45
"""Share of the peak that matrix products of long packs reach: Megatron-LM reports 41 to 48 % on H100."""

HALF_TOKENS = 128
"""Tokens at which a GPU reaches half of that efficiency; T times as many where each matrix is divided by T."""

LINK_SHARE = 0.8
"""Share of a link's speed that collectives of large messages reach."""

FILL = 0.5
"""Assumed length of a pair, as a share of the longest that ``data.maxLength`` allows."""


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a run."""

    nodes: int
    gpus: int
    """Processes of each node, each with its own GPU."""
    product: Product
    known: bool = True
    """False: ``product`` is assumed, because nothing says which one it is."""

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.nodes * self.gpus


def step_seconds(model: ModelFacts, spec: DPOJobSpec, layout: Layout, hardware: Hardware) -> float:
    """Predict the seconds of one optimizer step."""
    pairs = -(-spec.training.global_batch_size // layout.data)
    tokens_of_rank = max(1.0, pairs * 2 * spec.data.max_length * FILL)
    packs = max(1, round(-(-tokens_of_rank // layout.pack_tokens)))
    tokens = tokens_of_rank / packs / layout.context
    slowest = max(
        compute_seconds(model, spec, layout, stage, hardware, tokens)
        + tensor_seconds(model, spec, layout, stage, hardware, tokens)
        + context_seconds(model, spec, layout, stage, hardware, tokens)
        for stage in stages(model.layers, layout.pipeline)
    )
    # 1F1B: the last pack passes through every stage, while the others have nothing left to do (Narayanan et al., 2021).
    pipelined = (packs + layout.pipeline - 1) * (slowest + stage_seconds(model, spec, layout, hardware, tokens))
    return pipelined + data_seconds(model, spec, layout, hardware)


def compute_seconds(
    model: ModelFacts, spec: DPOJobSpec, layout: Layout, stage: Stage, hardware: Hardware, tokens: float
) -> float:
    """Seconds of a stage's matrix products for one pack, forward and backward.

    FLOPs are counted as in ``flops``, and what is repeated besides: by recomputation the forward pass of the layer or
    of its MLP, and always that of the LM head.
    """
    times = passes(trained=spec.lora is None)
    layer, mlp = matrices_of_layer(model), 3 * model.hidden * model.ffn
    repeated = {"none": 0, "selective": mlp, "full": layer}[layout.recomputation]
    flops = 2.0 * len(stage.layers) * (layer * times + repeated)
    if stage.last:
        flops += head_flops(model) * (times + 1)
    efficiency = EFFICIENCY * tokens / (tokens + HALF_TOKENS * layout.tensor)
    slower = 1 if spec.training.precision == "bf16" else 16  # fp32 outside the tensor cores
    return flops * tokens * slower / (layout.tensor * hardware.product.tflops * 1e12 * efficiency)


def tensor_seconds(
    model: ModelFacts, spec: DPOJobSpec, layout: Layout, stage: Stage, hardware: Hardware, tokens: float
) -> float:
    """Seconds that a stage's tensor-parallel ranks send for one pack.

    A layer gathers and reduces activations of width h twice forward and twice backward, (T - 1)/T of them each time;
    recomputation repeats the forward half (full) or that of the MLP (selective).
    """
    if layout.tensor == 1:
        return 0.0
    times = 8 + {"none": 0, "selective": 2, "full": 4}[layout.recomputation]
    each = value_bytes(spec) * model.hidden * tokens * (layout.tensor - 1) / layout.tensor
    product = hardware.product
    link = product.nvlink if layout.tensor <= hardware.gpus else product.network
    return len(stage.layers) * times * each / (LINK_SHARE * link * 1e9)


def context_seconds(
    model: ModelFacts, spec: DPOJobSpec, layout: Layout, stage: Stage, hardware: Hardware, tokens: float
) -> float:
    """Seconds that a stage's context-parallel ranks send for one pack, of which each has ``tokens``.

    A layer gathers keys and values forward, 2kv/T of each token of the C - 1 others, and reduces as many gradients
    backward; full recomputation gathers them again.
    """
    if layout.context == 1:
        return 0.0
    times = 3 if layout.recomputation == "full" else 2
    each = value_bytes(spec) * 2 * key_width(model, layout) * tokens * (layout.context - 1)
    product = hardware.product
    link = product.nvlink if layout.tensor * layout.context <= hardware.gpus else product.network
    return len(stage.layers) * times * each / (LINK_SHARE * link * 1e9)


def stage_seconds(model: ModelFacts, spec: DPOJobSpec, layout: Layout, hardware: Hardware, tokens: float) -> float:
    """Seconds that a stage sends one pack's activations to the next one, and their gradients back.

    Ranks of one stage follow each other, so stages are on different nodes if one fills a node.
    """
    if layout.pipeline == 1:
        return 0.0
    each = value_bytes(spec) * model.hidden * tokens / (layout.tensor if layout.sequence else 1)
    product = hardware.product
    link = product.network if hardware.processes // layout.pipeline >= hardware.gpus else product.nvlink
    return 2 * each / (LINK_SHARE * link * 1e9)


def data_seconds(model: ModelFacts, spec: DPOJobSpec, layout: Layout, hardware: Hardware) -> float:
    """Seconds that ranks with the same weights send in a step: fp32 gradients (4n), the updated weights (2n in bf16).

    These are the data- and context-parallel ranks. Within a node over NVLink. Beyond it a node's ranks of one group
    share the node's network.
    """
    shards = layout.data * layout.context
    if shards == 1:
        return 0.0
    value = value_bytes(spec) if spec.parallelism.distributed_optimizer else 4  # else all-reduced: 4n there and back
    trained = max(trained_of_rank(model, spec.lora, layout, stage) for stage in stages(model.layers, layout.pipeline))
    product = hardware.product
    link = product.nvlink
    if layout.tensor * shards > hardware.gpus:
        link = min(link, product.network * max(1, hardware.gpus // layout.tensor))
    return trained * (4 + value) * (shards - 1) / shards / (LINK_SHARE * link * 1e9)
