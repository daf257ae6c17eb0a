"""Which stored tensors hold which of Megatron-Core's parameters, of every layout that NeMo has written.

Keys are brought to the names that Megatron-Core's layer has without Transformer Engine, with the layer's number in the
whole model: ``decoder.layers.7.self_attention.linear_qkv.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dpo_api.models.megatron.stored import Stored

_OLD = (
    (re.compile(r"^language_model\.(?:encoder|transformer)\."), "decoder."),
    (re.compile(r"^language_model\."), ""),
    (re.compile(r"\.attention\."), ".self_attention."),
    (re.compile(r"\.post_attention_layernorm\."), ".pre_mlp_layernorm."),
    (re.compile(r"\.query_key_value\."), ".linear_qkv."),
    (re.compile(r"\.self_attention\.dense\."), ".self_attention.linear_proj."),
    (re.compile(r"\.mlp\.dense_h_to_4h(_2)?\."), r".mlp.linear_fc1\1."),
    (re.compile(r"\.mlp\.dense_4h_to_h\."), ".mlp.linear_fc2."),
)
_FUSED = (
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$"), r".input_layernorm.\1"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r".pre_mlp_layernorm.\1"),
)
GATE, UP = "mlp.linear_fc1.weight", "mlp.linear_fc1_2.weight"
"""End of the names of the gate and the up projection, where they are two parameters."""
_SINGLE = (  # of shards that Megatron-Core saves one by one
    (re.compile(r"\.mlp\.linear_fc1\.weight_w$"), f".{GATE}"),
    (re.compile(r"\.mlp\.linear_fc1\.weight_v$"), f".{UP}"),
)
_WRITERS = ("", "model.", "module.")
"""What comes before a parameter's name in the distributed checkpoints of Megatron-LM, NeMo 1 and NeMo 2."""
_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")
_STACKED = re.compile(r"^decoder\.layers\.(?!\d+\.)(.*)$")
_PREFIXES = ("model.", "module.", "_orig_mod.")
_IGNORED = re.compile(r"_extra_state|rotary_pos_emb|(^|\.)inv_freq$|^word_embeddings\.weight$")
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..*)$")


def parameter_of(key: str, first_layer: int = 0) -> str | None:
    """Return the parameter that a stored tensor belongs to; None for one that the model does not need.

    first_layer: of the pipeline stage, if the stage's layers are counted from 0.
    """
    name = key.replace("._orig_mod.", ".")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    if _IGNORED.search(name):
        return None
    for pattern, new in (*(_OLD if name.startswith("language_model.") else ()), *_FUSED, *_SINGLE):
        name = pattern.sub(new, name)
    found = _LAYER.match(name)
    return name if found is None else f"{found[1]}{int(found[2]) + first_layer}{found[3]}"


def layers_in(parameters: Iterable[str]) -> int:
    """Return how many layers the parameters are of: one more than the largest number."""
    return max((1 + int(found[2]) for name in parameters if (found := _LAYER.match(name))), default=0)


def distributed_parameters(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the model's parameters among the tensors of a distributed checkpoint, each layer's by itself.

    The layers' tensors are stacked along a first axis, or have the layer's number in their key. Optimizer states, whose
    keys end like those of the parameters, are left out.
    """
    found: dict[str, Stored] = {}
    writer = next((start for start in _WRITERS if f"{start}embedding.word_embeddings.weight" in tensors), None)
    if writer is None:
        return found
    for key, tensor in tensors.items():
        name = key.removeprefix(writer)
        if not key.startswith(writer) or not name.startswith(_OF_THE_MODEL):
            continue
        stacked = _STACKED.match(name)
        if stacked is None:
            names = {name: tensor}
        elif not tensor.shape:
            continue
        else:
            names = {f"decoder.layers.{i}.{stacked[1]}": tensor.layer(i) for i in range(tensor.shape[0])}
        for own, part in names.items():
            parameter = parameter_of(own)
            if parameter is not None:
                found[parameter] = part
    return found
