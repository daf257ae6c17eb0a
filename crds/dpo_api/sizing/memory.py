"""Predicts the bytes that a run takes on each GPU, and of host memory while a checkpoint is written.

Each term is a function that says where it comes from. The symbols: h hidden size, a width of all query heads, kv width
of all key-value groups, F feed-forward size, V vocabulary, L layers, T tensor, P pipeline, C context and D data
parallel size, S tokens of the largest pack, n the parameters of a rank. A value of the computation takes 2 bytes in
bf16 and 4 in fp32. With context parallelism, a rank has S/C tokens of a pack, and D · C ranks divide the
optimizer's state.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dpo_api.models import ModelFacts
from dpo_api.sizing.head import GPU_BLOCK_BYTES, GPU_BUDGET_BYTES, HeadChunks, head_bytes, head_chunks
from dpo_api.sizing.layout import Layout
from dpo_api.sizing.parameters import (
    Stage,
    adapted,
    adapter_parts,
    adapter_shape,
    group_width,
    inner_projections,
    matrices_of_layer,
    parameters,
    parameters_of_rank,
    query_width,
    stages,
    trained_of_rank,
)
from dpo_api.spec import DPOJobSpec, Lora

FREE_SHARE = 0.1
"""Share of a GPU's memory that a prediction leaves free: the CUDA context, NCCL's buffers, fragmentation, the error."""

ROW_COLUMN = {"attention_dense": "row", "mlp_fc2": "row", "attention_qkv": "column", "mlp_fc1": "column"}


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, by what takes them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    adapter_activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def value_bytes(spec: DPOJobSpec) -> int:
    """Bytes of one value in the computation."""
    return 2 if spec.training.precision == "bf16" else 4


def weight_bytes(held: int, value: int) -> int:
    """The weights in the computation's precision: 2n bytes in bf16."""
    return held * value


def fp8_bytes(model: ModelFacts, spec: DPOJobSpec, layout: Layout, stage: Stage) -> int:
    """Transformer Engine's copies of the layers' matrices in FP8, and of their transposes: 2 bytes for each weight."""
    if spec.transformer_engine.fp8 is None:
        return 0
    return 2 * len(stage.layers) * -(-matrices_of_layer(model) // layout.tensor)


def gradient_bytes(trained: int) -> int:
    """One fp32 buffer for the gradients of what is trained: 4n bytes. It is not divided by D."""
    return 4 * trained


def optimizer_bytes(trained: int, value: int, shards: int) -> int:
    """The fp32 masters and Adam's two fp32 moments over D: 12n/D bytes. In fp32 the weights are the masters."""
    return -(-trained // shards) * (12 if value == 2 else 8)


def attention_bytes_per_token(model: ModelFacts, layout: Layout, value: int) -> float:
    """What one layer keeps of a token for its backward pass outside the MLP, in bytes.

    Of width h: the layer's input, its norm, the sum after the attention and its norm, divided by T if ``sequence``. Of
    width a: the rotated queries and the attention's output. Of width kv: keys and values (see ``key_rows``). One value
    more of each of h and a is for what exists only while a layer runs backward. In bf16 and with a = h: 16h + 6kv
    bytes. A layer of four norms keeps the inputs of the two that are after its parts, too: 2h values more.
    """
    wide = (3 + model.norms) * model.hidden / (layout.tensor if layout.sequence else 1)
    keys = 2 * key_rows(layout) * key_width(model, layout)
    return value * (wide + 3 * query_width(model) / layout.tensor + keys)


def key_width(model: ModelFacts, layout: Layout) -> float:
    """The width of the keys of a rank: kv/T, but one group at least."""
    return max(group_width(model) / layout.tensor, group_width(model) / model.kv_heads)


def key_rows(layout: Layout) -> float:
    """Rows of keys that a layer keeps for each token of a rank, if prompts are half of the tokens.

    1.5: a prompt is in both of its pair's sequences. With context parallelism, of the S/C tokens of a rank: two chunks
    of each sequence see it up to their ends, (1 + 1/2C)S in sum, and the rejected one's two chunks see the prompt, S.
    """
    return 1.5 if layout.context == 1 else 2 * layout.context + 0.5


def mlp_bytes_per_token(model: ModelFacts, layout: Layout, value: int) -> float:
    """What one layer's MLP keeps of a token: 3F values, 6F bytes in bf16: gate, up, and silu(gate) · up.

    Without a gate 2F values: max(up, 0) and its square.
    """
    return value * (inner_projections(model) + 1) * model.ffn / layout.tensor


def input_bytes_per_token(model: ModelFacts, layout: Layout, value: int) -> float:
    """A layer's input, which is all that full recomputation keeps of it: h values, divided by T if ``sequence``."""
    return value * model.hidden / (layout.tensor if layout.sequence else 1)


def activation_bytes_per_token(model: ModelFacts, layout: Layout, stage: Stage, value: int) -> float:
    """What a stage keeps of a token, in bytes.

    Stage i of P computes up to P - i packs forward before the first of them comes back, and keeps all of them. What
    recomputation makes again exists once. none: (P - i) L/P (16h + 6kv + 6F); selective: (P - i) L/P (16h + 6kv) +
    6F; full: (P - i) L/P 2h + 16h + 6kv + 6F, all divided by T.
    """
    kept = len(stage.layers) * (layout.pipeline - stage.index)
    attention, mlp = (part(model, layout, value) for part in (attention_bytes_per_token, mlp_bytes_per_token))
    if layout.recomputation == "none":
        return kept * (attention + mlp)
    if layout.recomputation == "selective":
        return kept * attention + mlp
    return kept * input_bytes_per_token(model, layout, value) + attention + mlp


def adapter_bytes_per_token(model: ModelFacts, lora: Lora, layout: Layout, value: int) -> float:
    """What the adapters of one layer keep of a token beside their base.

    Each keeps its inner vector, whole on every rank. With ``sequence``, an adapter of q/k/v and of the MLP's first
    layer gathers its input; with dropout, each keeps what is left of its input or output.
    """
    total = 0.0
    for module in lora.modules:
        inputs, outputs = adapter_shape(model, module)
        total += lora.rank * adapter_parts(model, lora, module)
        if ROW_COLUMN[module] == "column" and layout.sequence:
            total += inputs
        if lora.dropout > 0:
            total += (inputs if lora.dropout_position == "pre" else outputs) / layout.tensor
    return value * total


def adapter_bytes(model: ModelFacts, lora: Lora | None, layout: Layout, stage: Stage, value: int) -> int:
    """What a stage's adapters keep of the largest packs; with full recomputation, one layer's for one pack."""
    if lora is None:
        return 0
    layers = adapted(stage, lora)
    kept = min(1, layers) if layout.recomputation == "full" else layers * (layout.pipeline - stage.index)
    of_tokens = adapter_bytes_per_token(model, lora, layout, value) * layout.pack_tokens / layout.context
    return round(kept * (of_tokens + wide_bytes(model, lora, layout, value)))


def wide_bytes(model: ModelFacts, lora: Lora, layout: Layout, value: int) -> float:
    """What one layer keeps of second matrices that are widened to the first matrices of all projections."""
    total = 0.0
    for module in lora.modules:
        parts = adapter_parts(model, lora, module)
        total += lora.rank * parts * adapter_shape(model, module)[1] if parts > 1 else 0
    return value * total / layout.tensor


def chunks_of(model: ModelFacts, layout: Layout, value: int, *, trained: bool) -> HeadChunks:
    """How the LM head divides the largest pack, of whose S/C tokens each may be a response's."""
    rows = layout.pack_tokens // layout.context
    return head_chunks(rows, columns_of(model, layout), value, GPU_BUDGET_BYTES, keep=trained)


def columns_of(model: ModelFacts, layout: Layout) -> int:
    """A rank's part of the vocabulary: V/T."""
    return -(-model.vocab // layout.tensor)


def logits_bytes(model: ModelFacts, layout: Layout, value: int, *, trained: bool) -> int:
    """The LM head's matrices of rows × V/T: 2SV/T bytes in bf16, at most 2 GiB.

    A frozen head needs one chunk at a time, at most 256 MiB. In bf16, where Triton's kernels do not run, the softmax is
    computed in 32 MiB of fp32. The head's gradient takes nothing: its GEMM adds it to the buffer of gradients.
    """
    held = head_bytes(chunks_of(model, layout, value, trained=trained), columns_of(model, layout), value)
    return held + (min(GPU_BLOCK_BYTES, 2 * held) if value == 2 else 0)


def memory_of_stage(model: ModelFacts, spec: DPOJobSpec, layout: Layout, stage: Stage) -> Memory:
    """Predict the bytes of each GPU of a stage while a step is computed."""
    value, lora = value_bytes(spec), spec.lora
    trained = trained_of_rank(model, lora, layout, stage)
    shards = layout.data * layout.context if spec.parallelism.distributed_optimizer else 1
    tokens = layout.pack_tokens / layout.context
    return Memory(
        weights=weight_bytes(parameters_of_rank(model, layout, stage), value)
        + (weight_bytes(trained, value) if lora is not None else 0)
        + fp8_bytes(model, spec, layout, stage),
        gradients=gradient_bytes(trained),
        optimizer=optimizer_bytes(trained, value, shards),
        activations=round(activation_bytes_per_token(model, layout, stage, value) * tokens),
        adapter_activations=adapter_bytes(model, lora, layout, stage, value),
        logits=logits_bytes(model, layout, value, trained=lora is None) if stage.last else 0,
    )


def memory_of(model: ModelFacts, spec: DPOJobSpec, layout: Layout) -> Memory:
    """Predict the bytes of a GPU of the stage that takes the most."""
    found = (memory_of_stage(model, spec, layout, stage) for stage in stages(model.layers, layout.pipeline))
    return max(found, key=lambda memory: memory.total)


def cut_layers(layers: int, pipeline: int) -> int:
    """Layers of the cut model in which the trainer compares a layout with one process: two, or one of each stage."""
    return min(layers, max(2, pipeline))


def comparison_bytes(model: ModelFacts, spec: DPOJobSpec) -> int:
    """Bytes of rank 0's GPU while a layout is compared: the cut model, whole, with its gradients, in fp32.

    In bf16 it is there in bf16 before, which takes less. The activations of four short pairs are left out.
    """
    cut = replace(model, layers=cut_layers(model.layers, spec.parallelism.pipeline))
    return 4 * parameters(cut) + (4 * parameters(cut) if spec.lora is None else 0)


def checkpoint_bytes(model: ModelFacts, spec: DPOJobSpec, layout: Layout) -> int:
    """Host memory of a rank while its part of a checkpoint is written: fp32 masters and two moments, 12n/D bytes."""
    shards = layout.data * layout.context if spec.parallelism.distributed_optimizer else 1
    held = (trained_of_rank(model, spec.lora, layout, stage) for stage in stages(model.layers, layout.pipeline))
    return 12 * -(-max(held) // shards)
