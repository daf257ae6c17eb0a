"""LoRA adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors.

Our adapters are attached to fused layers. B A of a fused layer is, for each part, that part's rows of B times the same
A, or with ``lora.continueAdapter`` the part's own, so the split into PEFT's separate projections is exact.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.learning import Lora
from dpo_api.models import ModelConfig, TensorNames
from dpo_api.models.adapter import PREFIX, linear_shapes
from dpo_api.models.stages import layers_of_stages
from dpo_store import Store, join_uri, open_store
from dpo_trainer import bridge
from dpo_trainer.formats.adapter import AdapterMatrices, projections_of
from dpo_trainer.formats.export import Planned, write_tensors
from dpo_trainer.formats.layout import split_qkv
from dpo_trainer.model.forward import unwrap
from dpo_trainer.model.lora import LowRankAdapter, Trained, adapters, scale_of


def export_adapter(
    model: Any,
    lora: Lora,
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
    of all writes. trained: see ``model.lora.merged_value``. below: an adapter of the start model on ``base``. What is
    written is then the same adapter, trained on, if ``lora`` continues it, else the sum of both, whose rank is the sum
    of theirs.
    """
    of_model: ModelConfig = unwrap(model).dpo_config
    continued = below if lora.continue_adapter else None
    targets = tuple(_targets(lora, of_model)) if continued is None else continued.adapter.targets
    tensors = of_all_stages(model, lora.rank, targets, adapter_tensors(model, trained))
    if tensors is None:
        return []
    config = adapter_config(lora, base, of_model.row.tensors)
    if continued is not None:  # its own keys say where PEFT attaches it
        kept = ("base_model_name_or_path", "lora_dropout", "inference_mode")
        config = {**continued.adapter.config, **{key: config[key] for key in kept}}
    elif below is not None:
        tensors, changes = _summed(tensors, lora, below, of_model)
        config |= changes
    plan: list[Planned] = [(name, tuple(value.shape), dtype or torch.float32) for name, value in tensors.items()]
    store, address = store or open_store(), str(out).rstrip("/")
    store.write(join_uri(address, "adapter_config.json"), (json.dumps(config, indent=2) + "\n").encode())
    write_tensors(store, join_uri(address, "adapter_model.safetensors"), plan, iter(tensors.values()))
    return ["adapter_config.json", "adapter_model.safetensors"]


def adapter_tensors(model: Any, trained: Trained | None = None) -> dict[str, Tensor]:
    """PEFT's names → fp32 matrices. Each projection has its own A, since safetensors refuses shared memory."""
    config: ModelConfig = unwrap(model).dpo_config
    found: dict[str, Tensor] = {}
    for adapter in adapters(model):
        a, b = adapter.matrices(trained)
        of = projections_of(config, adapter.place.layer, adapter.place.module)
        parts = _parts(adapter, b, config)
        firsts = (a,) * len(of) if adapter.owners is None else a.chunk(len(of))
        for name, first, part in zip(of, firsts, parts if len(of) > 1 else (torch.cat(parts),), strict=True):
            found[f"{PREFIX}{name}.lora_A.weight"] = first.clone()
            found[f"{PREFIX}{name}.lora_B.weight"] = part.contiguous()
    return found


def _summed(
    tensors: dict[str, Tensor], lora: Lora, below: AdapterMatrices, config: ModelConfig
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


def of_all_stages(model: Any, rank: int, targets: Collection[str], own: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the adapters of all pipeline stages on the first stage's first tensor-parallel rank; None elsewhere.

    rank: theirs. targets: Hugging Face's names of the linear layers whose adapters are returned, in this order. own:
    this stage's ``adapter_tensors``, fp32.
    """
    config: ModelConfig = unwrap(model).dpo_config
    here = parallel_state.get_pipeline_model_parallel_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    found = dict(own)
    spans = layers_of_stages(config.num_layers, parallel_state.get_pipeline_model_parallel_world_size())
    for stage, span in enumerate(spans[1:], start=1):
        shapes = _shapes(config, rank, targets, span)
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
    return {name: found[name] for name in _shapes(config, rank, targets, range(config.num_layers))} if first else None


def _shapes(config: ModelConfig, rank: int, targets: Collection[str], span: range) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of ``adapter_tensors`` for a stage of these layers."""
    shapes, prefixes = linear_shapes(config), tuple(f"{config.row.tensors.layer(layer)}." for layer in span)
    found: dict[str, tuple[int, ...]] = {}
    for name in targets:
        if name.startswith(prefixes):
            outputs, inputs = shapes[name]
            found[f"{PREFIX}{name}.lora_A.weight"] = (rank, inputs)
            found[f"{PREFIX}{name}.lora_B.weight"] = (outputs, rank)
    return found


def _targets(lora: Lora, config: ModelConfig) -> Iterator[str]:
    """Yield Hugging Face's names of the linear layers that get a new adapter, without ``.weight``."""
    for layer in range(config.num_layers) if lora.layers is None else sorted(set(lora.layers)):
        for module in lora.modules:
            yield from projections_of(config, layer, module)


def adapter_config(lora: Lora, base: str, names: TensorNames) -> dict[str, Any]:
    """Return the content of adapter_config.json. PEFT's scale is ours: see ``model.lora.scale_of``."""
    alpha = lora.rank if lora.alpha is None else lora.alpha
    targets = [name for module in lora.modules for name in names.projections(module)]
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
