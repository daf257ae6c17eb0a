"""Distributed checkpoints of Megatron-Core's documented layouts, of the tiny models of ``nemo_archives``."""

import json
import warnings
import zlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from dpo_api.models.megatron.distributed import TABLE
from dpo_testing.nemo_archives import State, Tiny, content
from dpo_trainer.checkpoint import files
from dpo_trainer.checkpoint.boxes import Box

_NAMES = (
    ("model.language_model.encoder.", "decoder."),
    ("model.language_model.", ""),
    ("post_attention_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("query_key_value", "linear_qkv"),
    ("self_attention.dense", "self_attention.linear_proj"),
    ("dense_h_to_4h", "linear_fc1"),
    ("dense_4h_to_h", "linear_fc2"),
)


def core(weights: State) -> State:
    """Megatron-Core's keys, with the layers' numbers."""
    found = {}
    for name, value in weights.items():
        new = name
        for old, other in _NAMES:
            new = new.replace(old, other)
        if "rotary" not in new:
            found[new] = value
    return found


def stacked(tensors: State, layers: int) -> State:
    """The same with the layers' tensors along a first axis."""
    found = {name: value for name, value in tensors.items() if ".layers." not in name}
    for name in tensors:
        if ".layers.0." in name:
            every = [tensors[name.replace(".layers.0.", f".layers.{i}.")] for i in range(layers)]
            found[name.replace(".layers.0.", ".layers.")] = torch.stack(every)
    return found


def prefixed(tensors: State, prefix: str) -> State:
    """The same under keys that begin with ``prefix``, and an optimizer's state beside them."""
    found = {prefix + name: value for name, value in tensors.items()}
    return found | {f"optimizer.state.exp_avg.{prefix}{name}": -value for name, value in tensors.items()}


def arguments(tiny: Tiny, **changes: Any) -> Namespace:
    """Megatron-LM's arguments for the model, with some of the many others."""
    from megatron.core.transformer.enums import AttnBackend

    values = {
        "num_layers": tiny.layers,
        "hidden_size": tiny.hidden,
        "ffn_hidden_size": tiny.ffn,
        "num_attention_heads": tiny.heads,
        "group_query_attention": False,
        "num_query_groups": 1,
        "kv_channels": tiny.hidden // tiny.heads,
        "max_position_embeddings": tiny.positions,
        "normalization": "RMSNorm" if tiny.norm == "rmsnorm" else "LayerNorm",
        "apply_layernorm_1p": tiny.norm == "layernorm1p",
        "norm_epsilon": tiny.eps,
        "swiglu": tiny.activation == "fast-swiglu",
        "squared_relu": tiny.activation == "squared-relu",
        "add_bias_linear": False,
        "add_qkv_bias": tiny.qkv_bias,
        "position_embedding_type": "rope",
        "rotary_percent": tiny.rotary,
        "rotary_base": 10000,
        "untie_embeddings_and_output_weights": not tiny.tied,
        "params_dtype": torch.bfloat16,
        "attention_backend": AttnBackend.auto,
        "save": Path("/checkpoints"),
    }
    return Namespace(**{**values, **changes})


def torch_dist(folder: Path, tensors: State, objects: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint by torch itself. objects: what is no tensor, saved by ``torch.save``."""
    state = {**tensors, **(objects or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=folder, planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


def torch_dist_of_ranks(folder: Path, tensors: State) -> Path:
    """Write it as two ranks do: each the half of every tensor, along one axis or the other."""
    folder.mkdir(parents=True)
    written: list[files.Written] = []
    for rank in range(2):
        boxes = []
        for name, value in tensors.items():
            axis = value.dim() - 1
            half = value.chunk(2, axis)[rank].contiguous()
            offsets = [0] * value.dim()
            offsets[axis] = rank * (-(-value.shape[axis] // 2))
            boxes.append(Box(name, tuple(offsets), tuple(value.shape), half))
        written += files.write(folder, rank, boxes)
    (folder / TABLE).write_bytes(files.table(written))
    return folder


COMPRESSORS: dict[str | None, Callable[[bytes], bytes]] = {
    None: bytes,
    "zlib": zlib.compress,
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}


def zarr(folder: Path, tensors: State, *, parts: int = 1, compressor: str | None = None) -> Path:
    """Write a checkpoint as Megatron-Core before 0.7: ``parts`` chunks along the last axis of each tensor."""
    for key, value in tensors.items():
        place = folder / key
        place.mkdir(parents=True)
        each = [*value.shape[:-1], -(-value.shape[-1] // parts)]
        described = {
            "zarr_format": 2,
            "shape": list(value.shape),
            "chunks": each,
            "dtype": "bfloat16" if value.dtype == torch.bfloat16 else "<f4",
            "compressor": None if compressor is None else {"id": compressor, "level": 1},
            "fill_value": None,
            "order": "C",
            "filters": None,
        }
        (place / ".zarray").write_text(json.dumps(described))
        whole = torch.zeros([*value.shape[:-1], each[-1] * parts], dtype=value.dtype)  # the last chunk extends beyond
        whole[..., : value.shape[-1]] = value
        for number, chunk in enumerate(whole.chunk(parts, -1)):
            name = ".".join(["0"] * (value.dim() - 1) + [str(number)])
            data = _bytes(chunk)
            (place / name).write_bytes(COMPRESSORS[compressor](data))
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    return folder


def nemo_members(tiny: Tiny, weights: State, folder: Path) -> dict[str, bytes]:
    """The members of a .nemo archive whose weights are the distributed checkpoint in ``folder``."""
    members = content(tiny, weights)
    del members["model_weights.ckpt"]
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            members[f"model_weights/{path.relative_to(folder)}"] = path.read_bytes()
    return members


def _bytes(value: Tensor) -> bytes:
    return bytes(value.contiguous().view(-1).view(torch.uint8).numpy())
