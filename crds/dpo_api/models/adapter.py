"""A LoRA adapter in PEFT's format, such as the result of supervised fine-tuning: what it says, and whether it fits."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_api.errors import InvalidModelError, InvalidSpecError, NotFoundError
from dpo_api.learning import LORA_GROUPS, Lora
from dpo_api.models.config import ModelConfig
from dpo_api.models.folder import Objects, exists, file_in, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
_HEADER_MAX = 100_000_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("bias", ("none", None), "trained biases"),
    ("use_dora", (False, None), "DoRA's magnitudes"),
    ("modules_to_save", ((), None), "whole trained modules"),
    ("rank_pattern", ((), None), "ranks that differ"),
    ("alpha_pattern", ((), None), "scales that differ"),
    ("lora_bias", (False, None), "biases of its own"),
    ("layer_replication", ((), None), "repeated layers"),
    ("trainable_token_indices", ((), None), "trained embeddings"),
    ("target_parameters", ((), None), "adapters of single parameters"),
    ("init_lora_weights", (True, False, None, "gaussian", "orthogonal", "eva"), "changed weights of the base model"),
)
"""Keys of adapter_config.json, the values that mean nothing here ("()": anything empty), and what others mean."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits its model. The layer y = Wx becomes y = (W + scale · B A) x."""

    uri: str
    rank: int
    alpha: float
    rslora: bool
    """Whether the scale is alpha / √rank instead of alpha / rank."""
    targets: tuple[str, ...]
    """Hugging Face's names of the linear layers that have A and B, without ``.weight``."""
    config: Mapping[str, Any]
    """The content of adapter_config.json."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    def other_base(self, model: str) -> str | None:
        """Return the hub's name of the model that the adapter is of, if ``model`` is another address of the hub."""
        named = str(self.config.get("base_model_name_or_path", ""))
        ours = re.match(r"hf://([^/@]+/[^/@]+)", model)
        return None if ours is None or not _HUB_NAME.fullmatch(named) or named == ours[1] else named


def read_adapter(files: Objects, folder: str, config: ModelConfig) -> Adapter:
    """Read an adapter's configuration and the header of its weights, and compare them with the model.

    Raises NotFoundError if one is absent, and InvalidModelError naming the key or the tensor that is wrong, not
    supported, or of another model.
    """
    uri = file_in(folder, CONFIG)
    raw = read_json(files, uri)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InvalidModelError(f"{uri}: peft_type is {kind!r}; only LORA is supported: merge the adapter first")
    for key, allowed, means in _REFUSED:
        value = raw.get(key)
        if value not in allowed and not (allowed[0] == () and not value):
            raise InvalidModelError(f"{uri}: {key} is {value!r}, {means}: not supported; merge the adapter first")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InvalidModelError(f"{uri}: r is {rank!r}, not a whole number above 0; copy the file again")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        raise InvalidModelError(f"{uri}: lora_alpha is {alpha!r}, not a number above 0; copy the file again")
    targets = _targets(_shapes(files, folder), rank, config, file_in(folder, WEIGHTS))
    return Adapter(folder.rstrip("/"), rank, float(alpha), bool(raw.get("use_rslora")), targets, raw)


def continued(lora: Lora, adapter: Adapter, config: ModelConfig) -> Lora:
    """Return the settings of a run that trains ``adapter`` itself (``lora.continueAdapter``).

    rank, alpha, rslora, targetModules and layers are the adapter's. Raises InvalidSpecError naming one of them that the
    spec sets to something else.
    """
    places = {
        f"{config.row.tensors.layer(layer)}.{name}": (layer, module)
        for layer in range(config.num_layers)
        for module in LORA_GROUPS["all"]
        for name in config.row.tensors.projections(module)
    }
    held = [places[target] for target in adapter.targets]
    layers = tuple(sorted({layer for layer, _ in held}))
    found: dict[str, Any] = {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "rslora": adapter.rslora,
        "target_modules": tuple(module for module in LORA_GROUPS["all"] if module in {module for _, module in held}),
        "layers": None if len(layers) == config.num_layers else layers,
    }
    said = {**{name: getattr(lora, name) for name in found}, "target_modules": lora.modules}
    said["layers"] = None if lora.layers is None else tuple(sorted(lora.layers))
    for name, own in {**found, "layers": layers}.items():
        if name in lora.model_fields_set and said[name] not in (None, own):
            shown = list(own) if isinstance(own, tuple) else own
            raise InvalidSpecError(
                f"spec.lora.{Lora.model_fields[name].alias}: not that of model.adapter, {shown}; leave it out, or set"
                " continueAdapter to false to train a new adapter"
            )
    return lora.model_copy(update=found)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every linear layer inside the model's layers, by Hugging Face's name."""
    h, f, names = config.hidden_size, config.ffn_hidden_size, config.row.tensors
    q, kv = config.num_attention_heads * config.head_dim, config.num_query_groups * config.head_dim
    qkv = (q, kv, kv) if len(names.qkv) > 1 else (q + 2 * kv,)
    into = f * (2 if config.gated else 1) // len(names.gate_up)
    of_layer = {
        **{name: (rows, h) for name, rows in zip(names.qkv, qkv, strict=True)},
        names.attention_output: (h, q),
        **dict.fromkeys(names.gate_up, (into, h)),
        names.down: (h, f),
    }
    layers = range(config.num_layers)
    return {f"{names.layer(layer)}.{name}": shape for layer in layers for name, shape in of_layer.items()}


def _targets(shapes: Mapping[str, tuple[int, ...]], rank: int, config: ModelConfig, uri: str) -> tuple[str, ...]:
    """Return the layers that have an adapter, in the model's order. Raises InvalidModelError for what does not fit."""
    layers = linear_shapes(config)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer, _, matrix = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if matrix not in ("lora_A", "lora_B") or layer not in layers or not name.startswith(PREFIX):
            known = _words({known.split(".", 3)[-1] for known in layers})
            raise InvalidModelError(
                f"{uri}: tensor {name} is none of an adapter of this model, whose layers have {known}; use an adapter"
                " of this model, or merge it first"
            )
        found.setdefault(layer, {})[matrix] = shape
    if not found:
        raise InvalidModelError(f"{uri}: holds no adapter; copy the file again")
    for layer, matrices in found.items():
        outputs, inputs = layers[layer]
        for matrix, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            if matrices.get(matrix) != shape:
                has = "is missing" if matrix not in matrices else f"has shape {list(matrices[matrix])}"
                raise InvalidModelError(
                    f"{uri}: {matrix} of {layer} {has}, but r {rank} and this model mean {list(shape)}; use an adapter"
                    " of this model"
                )
    return tuple(layer for layer in layers if layer in found)


def _words(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _shapes(files: Objects, folder: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the header of the adapter's weights."""
    uri = file_in(folder, WEIGHTS)
    if not exists(files, uri) and exists(files, file_in(folder, PICKLED)):
        raise InvalidModelError(
            f"{file_in(folder, PICKLED)}: pickled weights are not read; save the adapter again with a newer PEFT,"
            f" which writes {WEIGHTS}"
        )
    try:
        (length,) = struct.unpack("<Q", files.read(uri, 0, 8))
        header = json.loads(files.read(uri, 8, min(length, _HEADER_MAX)))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except NotFoundError:
        raise NotFoundError(f"{folder}: holds {CONFIG}, but not {WEIGHTS}; copy it too") from None
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidModelError(f"{uri}: not a safetensors file ({error}); copy it again") from None
