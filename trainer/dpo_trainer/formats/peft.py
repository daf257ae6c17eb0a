"""LoRA adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors.

Our adapters are attached to fused layers. B A of a fused layer is, for each part, that part's rows of B times the same
A, so the split into PEFT's separate projections is exact.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.models import ModelConfig, TensorNames
from dpo_api.models.adapter import PREFIX, linear_shapes
from dpo_api.models.stages import layers_of_stages
from dpo_store import Store, join_uri, open_store
from dpo_trainer import bridge
from dpo_trainer.formats.adapter import AdapterMatrices
from dpo_trainer.formats.export import Planned, write_tensors
from dpo_trainer.formats.layout import slots, split_qkv
from dpo_trainer.model.forward import unwrap
from dpo_trainer.model.lora import (
    LoraSettings,
    LowRankAdapter,
    Module,
    Trained,
    adapters,
    scale_of,
    target_modules,
)


def projections(names: TensorNames, module: Module) -> tuple[str, ...]:
    """Return the names of the Hugging Face linear layers that one of our modules is made of."""
    of: dict[Module, tuple[str, ...]] = {
        "attention_qkv": names.qkv,
        "attention_dense": (names.attention_output,),
        "mlp_fc1": names.gate_up,
        "mlp_fc2": (names.down,),
    }
    return of[module]


def export_adapter(
    model: Any,
    lora: LoraSettings,
    base: str,
    out: str | Path,
    *,
    store: Store | None = None,
    dtype: torch.dtype | None = None,
    trained: Trained | None = None,
    below: AdapterMatrices | None = None,
) -> list[str]:
    """Write the adapters for ``PeftModel.from_pretrained`` on the Hugging Face model ``base``; return the files' names.

    out: a folder's address; store: to write with. dtype: of the written matrices; None means fp32; adapters are small.
    Raises NoSpaceError when the disk is full. A collective over the tensor-parallel ranks of all stages; only the first
    of all writes. trained: see ``model.lora.merged_value``. below: an adapter of the start model on ``base``; what is
    written is then the sum of both, whose rank is the sum of theirs.
    """
    names = unwrap(model).dpo_config.row.tensors
    tensors = of_all_stages(model, lora, adapter_tensors(model, trained))
    if tensors is None:
        return []
    config = adapter_config(lora, base, names)
    if below is not None:
        tensors, changes = _summed(tensors, lora, below, unwrap(model).dpo_config)
        config |= changes
    plan: list[Planned] = [(name, tuple(value.shape), dtype or torch.float32) for name, value in tensors.items()]
    store, address = store or open_store(), str(out).rstrip("/")
    store.write(join_uri(address, "adapter_config.json"), (json.dumps(config, indent=2) + "\n").encode())
    write_tensors(store, join_uri(address, "adapter_model.safetensors"), plan, iter(tensors.values()))
    return ["adapter_config.json", "adapter_model.safetensors"]


def adapter_tensors(model: Any, trained: Trained | None = None) -> dict[str, Tensor]:
    """PEFT's names → fp32 matrices. Each projection has its own A, since safetensors refuses shared memory."""
    config: ModelConfig = unwrap(model).dpo_config
    names = config.row.tensors
    found: dict[str, Tensor] = {}
    for adapter in adapters(model):
        a, b = adapter.matrices(trained)
        of = projections(names, adapter.place.module)
        parts = _parts(adapter, b, config)
        for projection, part in zip(of, parts if len(of) > 1 else (torch.cat(parts),), strict=True):
            prefix = f"{PREFIX}{names.layer(adapter.place.layer)}.{projection}"
            found[f"{prefix}.lora_A.weight"] = a.clone()
            found[f"{prefix}.lora_B.weight"] = part.contiguous()
    return found


def _summed(
    tensors: dict[str, Tensor], lora: LoraSettings, below: AdapterMatrices, config: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the sum of two adapters as one, in which each has its rows of A and its columns of B.

    tensors: of the upper one, by PEFT's names. Returns the sum's, of scale 1, and its keys of adapter_config.json. It
    has each kind of layer that one of them has, in all of the model's layers: PEFT has no other form.
    """
    lower, rank = below.adapter, lora.rank + below.adapter.rank
    upper = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    shapes = linear_shapes(config)
    ends = {name.rpartition(".")[2] for name in (*upper, *lower.targets)}
    found: dict[str, Tensor] = {}
    for layer, (outputs, inputs) in shapes.items():
        if layer.rpartition(".")[2] not in ends:
            continue
        a, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
        if layer in lower.targets:
            a[: lower.rank], b[:, : lower.rank] = below.a(layer), lower.scale * below.b(layer)
        if layer in upper:
            a[lower.rank :] = tensors[f"{PREFIX}{layer}.lora_A.weight"]
            b[:, lower.rank :] = scale_of(lora) * tensors[f"{PREFIX}{layer}.lora_B.weight"]
        found |= {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
    changes = {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": sorted(ends)}
    return found, {**changes, "layers_to_transform": None, "layers_pattern": None}


def of_all_stages(model: Any, lora: LoraSettings, own: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the adapters of all pipeline stages on the first stage's first tensor-parallel rank; None elsewhere.

    own: this stage's ``adapter_tensors``, fp32.
    """
    config: ModelConfig = unwrap(model).dpo_config
    here = parallel_state.get_pipeline_model_parallel_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    found = dict(own)
    spans = layers_of_stages(config.num_layers, parallel_state.get_pipeline_model_parallel_world_size())
    for stage, span in enumerate(spans[1:], start=1):
        shapes = _shapes(config, lora, span)
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        if here == stage and own:
            flat = torch.cat([own[name].flatten() for name in shapes]).to(bridge.device())
        else:
            flat = torch.empty(sum(sizes), device=bridge.device())
        if sizes:
            dist.broadcast(flat, src=dist.get_global_rank(group, stage), group=group)
        parts = flat.cpu().split(sizes)
        found |= {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    first = here == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
    return found if first else None


def _shapes(config: ModelConfig, lora: LoraSettings, span: range) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of ``adapter_tensors`` for a stage of these layers."""
    chosen = span if lora.layers is None else [layer for layer in span if layer in lora.layers]
    found: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for slot in slots(config, span, first=False, last=False):
        sizes.update(zip(slot.sources, slot.shapes, strict=True))
    for layer in chosen:
        for module in target_modules(lora.target_modules):
            for projection in projections(config.row.tensors, module):
                name = f"{config.row.tensors.layer(layer)}.{projection}"
                outputs, inputs = sizes[f"{name}.weight"]
                found[f"{PREFIX}{name}.lora_A.weight"] = (lora.rank, inputs)
                found[f"{PREFIX}{name}.lora_B.weight"] = (outputs, lora.rank)
    return found


def adapter_config(lora: LoraSettings, base: str, names: TensorNames) -> dict[str, Any]:
    """Return the content of adapter_config.json. PEFT's scale is ours: see ``model.lora.scale_of``."""
    alpha = lora.rank if lora.alpha is None else lora.alpha
    targets = [name for module in target_modules(lora.target_modules) for name in projections(names, module)]
    layers = None if lora.layers is None else sorted(set(lora.layers))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [name.rpartition(".")[2] for name in targets],
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else names.layers.rpartition(".")[2],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": lora.rslora,
        "inference_mode": True,
    }


def _parts(adapter: LowRankAdapter, b: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    if adapter.place.module == "attention_qkv":
        return split_qkv(b, config)
    if adapter.place.gated:
        return tuple(b.chunk(2))
    return (b,)
