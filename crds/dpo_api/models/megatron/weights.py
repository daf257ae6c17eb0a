"""Which stored tensors hold which of Megatron-Core's parameters, of every layout that NeMo has written.

Keys are brought to the names that Megatron-Core's layer has without Transformer Engine, with the layer's number in the
whole model: ``decoder.layers.7.self_attention.linear_qkv.weight``.
"""

from __future__ import annotations

import re

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
    for pattern, new in (*(_OLD if name.startswith("language_model.") else ()), *_FUSED):
        name = pattern.sub(new, name)
    found = _LAYER.match(name)
    return name if found is None else f"{found[1]}{int(found[2]) + first_layer}{found[3]}"
