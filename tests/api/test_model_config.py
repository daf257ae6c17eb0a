"""config.json: what is read, and everything that is refused by name."""

from dataclasses import replace
from typing import Any

import pytest

from dpo_api.errors import InvalidModelError
from dpo_api.models import ModelConfig, RopeScaling, YarnScaling, parse_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}


def read(**changes: Any) -> ModelConfig:
    raw = {**BASE, **changes}
    return parse_config({k: v for k, v in raw.items() if v is not ...}, "m/config.json")


def test_a_llama_2() -> None:
    config = read(torch_dtype="float16", max_position_embeddings=4096, rope_scaling=None)
    assert (config.num_query_groups, config.head_dim) == (4, 16)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert (config.dtype, config.norm_eps) == ("float16", 1e-5)
    assert config.window is None
    assert not any((config.tied_embeddings, config.qkv_bias, config.qk_norm))


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3}},
    ],
    ids=["old", "older", "new"],
)
def test_rope_keys_of_old_and_new_transformers(keys: dict[str, Any]) -> None:
    config = read(**keys)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, YarnScaling(4.0, 32768, 1.1386294361119891)),
        ({"attention_factor": 0.5, "beta_fast": 16, "beta_slow": 2}, YarnScaling(4.0, 32768, 0.5, 16.0, 2.0)),
        ({"truncate": False, "attention_factor": None}, YarnScaling(4.0, 32768, 1.1386294361119891, truncate=False)),
        # (0.0707 ln 4 + 1) / (0.1414 ln 4 + 1)
        ({"mscale": 0.707, "mscale_all_dim": 1.414}, YarnScaling(4.0, 32768, 1.0980110113 / 1.1960220227)),
        ({"mscale": 0.707}, YarnScaling(4.0, 32768, 1.1386294361119891)),
        ({"factor": 1.0}, YarnScaling(1.0, 32768, 1.0)),
    ],
)
def test_yarn(keys: dict[str, Any], expected: YarnScaling) -> None:
    found = read(max_position_embeddings=131072, rope_scaling={**YARN, **keys}).rope_scaling
    assert isinstance(found, YarnScaling)
    assert found == replace(expected, attention_factor=pytest.approx(expected.attention_factor, rel=1e-9))


def test_where_the_original_length_is_read() -> None:
    """Beside the rope's settings first, as in transformers, then among them, then the model's own length."""
    rope = {"rope_type": "yarn", "factor": 4.0}
    lengths = {"max_position_embeddings": 128, "rope_scaling": rope}
    assert read(**lengths).rope_scaling.original_max_positions == 128  # type: ignore[union-attr]
    lengths["rope_scaling"] = {**rope, "original_max_position_embeddings": 64}
    assert read(**lengths).rope_scaling.original_max_positions == 64  # type: ignore[union-attr]
    assert read(**lengths, original_max_position_embeddings=32).rope_scaling.original_max_positions == 32  # type: ignore[union-attr]


NEMOTRON = {"model_type": "nemotron", "hidden_act": ..., "rms_norm_eps": ..., "head_dim": 24}

STABLELM = {"model_type": "stablelm", "num_key_value_heads": 2, "rms_norm_eps": ...}


def test_partial_rotary_keys_of_old_and_new_transformers() -> None:
    assert read(**NEMOTRON).rotary_dim == 12  # transformers' default for Nemotron: one half
    assert read(**NEMOTRON, partial_rotary_factor=0.25).rotary_dim == 6
    assert read(**NEMOTRON, rope_parameters={"partial_rotary_factor": 0.25, "rope_theta": 1e4}).rotary_dim == 6
    assert read(**NEMOTRON, rope_parameters={"rope_theta": 1e4}).rotary_dim == 12
    assert read(**NEMOTRON, partial_rotary_factor=1.0).rotary_dim is None


def test_dtype_keys_of_old_and_new_transformers() -> None:
    assert read(torch_dtype="bfloat16").dtype == read(dtype="bfloat16").dtype == "bfloat16"
    assert read().dtype is None


def test_families() -> None:
    mistral = read(model_type="mistral", num_key_value_heads=2, sliding_window=4096, head_dim=128)
    assert (mistral.window, mistral.head_dim, mistral.window_of(3)) == (4096, 128, 4096)
    assert read(model_type="mistral", num_key_value_heads=2, sliding_window=None).window is None
    # An absent key is what transformers' own class takes: a window of 4,096.
    assert read(model_type="mistral", num_key_value_heads=2).window == 4096
    qwen = {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 100, "max_window_layers": 3}
    assert read(**qwen).window is None
    assert read(**qwen).qkv_bias
    windowed = read(**qwen, use_sliding_window=True)
    assert [windowed.window_of(i) for i in range(4)] == [None, None, None, 100]
    named = read(**qwen, use_sliding_window=True, layer_types=["sliding_attention", *["full_attention"] * 3])
    assert [named.window_of(i) for i in range(4)] == [100, None, None, None]
    assert read(**{**qwen, "max_window_layers": 4}, use_sliding_window=True).window is None
    nemotron = read(**NEMOTRON)
    assert (nemotron.norm, nemotron.activation, nemotron.norm_eps) == ("layernorm1p", "relu2", 1e-5)
    assert (nemotron.norm_bias, nemotron.gated) == (True, False)
    assert read(**NEMOTRON, norm_eps=1e-4).norm_eps == 1e-4
    stablelm = read(**STABLELM)
    assert (stablelm.norm, stablelm.activation, stablelm.norm_eps) == ("layernorm", "swiglu", 1e-5)
    assert (stablelm.rotary_dim, stablelm.qkv_bias) == (4, False)
    assert read(**STABLELM, use_qkv_bias=True, layer_norm_eps=1e-4).qkv_bias
    phi4 = read(model_type="phi3", rms_norm_eps=..., partial_rotary_factor=0.75, sliding_window=None)
    assert (phi4.norm_eps, phi4.rotary_dim, phi4.window, phi4.num_query_groups) == (1e-5, 12, None, 4)
    assert read(model_type="phi3", sliding_window=2047).window == 2047
    qwen3 = read(model_type="qwen3", num_key_value_heads=2, tie_word_embeddings=True)
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.tied_embeddings) == (True, 128, True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral"}, r'model_type is "mixtral": supported are llama, mistral, qwen2, qwen3'),
    ({"model_type": ...}, r"model_type is null"),
    ({"num_local_experts": 8}, r"num_local_experts is 8: mixture-of-experts"),
    ({"num_experts": 64}, r"num_experts is 64"),
    ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures is .*only …ForCausalLM"),
    ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config is .*gptq.*use the original model"),
    ({"hidden_act": "gelu"}, r'hidden_act is "gelu": only silu'),
    ({"attention_bias": True}, r"attention_bias is true: a bias on o_proj"),
    ({"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True}, r"attention_bias is true"),
    ({"mlp_bias": True}, r"mlp_bias is true"),
    ({"rope_scaling": {"rope_type": "yarn"}}, r"factor is missing"),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1}},
        r"beta_fast is 1.0: it must be above beta",
    ),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r'rope_scaling\.rope_type is "dynamic"'),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, r'rope_parameters\.rope_type is "longrope"'),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        r"rope_parameters is .*a different rope for each layer type",
    ),
    (
        {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}},
        r'rope_scaling\.rope_type is "su": .* use a model without longrope',
    ),
    (
        {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
        r'rope_scaling\.rope_type is "linear": only default is supported for this family',
    ),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"low_freq_factor is missing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, r"factor is -2"),
    ({"rope_scaling": "linear"}, r'rope_scaling is "linear": it must be an object'),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5: only full rotary"),
    ({**NEMOTRON, "partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1.5: of the 24 channels"),
    ({**NEMOTRON, "partial_rotary_factor": 0.3}, r"partial_rotary_factor is 0.3: of the 24 channels"),
    ({**NEMOTRON, "hidden_act": "silu"}, r'hidden_act is "silu": only relu2'),
    ({**NEMOTRON, "attention_bias": True}, r"attention_bias is true: a bias on q, k, v and o_proj"),
    ({**NEMOTRON, "mlp_bias": True}, r"mlp_bias is true"),
    ({**STABLELM, "use_parallel_residual": True}, r"use_parallel_residual is true: an MLP beside the attention"),
    ({**STABLELM, "qk_layernorm": True}, r"qk_layernorm is true: a norm of its own for each head"),
    ({**STABLELM, "head_dim": 32}, r"head_dim is 32: a head size of its own"),
    ({"vocab_size": ...}, r"vocab_size is missing"),
    ({"hidden_size": "64"}, r'hidden_size is "64": it must be a positive integer'),
    ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads is 3: it must divide num_attention_heads 4"),
    ({"hidden_size": 65}, r"hidden_size is 65: not divisible by num_attention_heads 4; set head_dim"),
    ({"head_dim": 15}, r"head_dim is 15: it must be even"),
    ({"torch_dtype": "float8_e4m3fn"}, r'dtype is "float8_e4m3fn"'),
    ({"model_type": "mistral", "num_key_value_heads": 2, "layer_types": ["full_attention"] * 4}, r"layer_types"),
    (
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "layer_types": ["chunked"] * 4},
        r"layer_types is .*full_attention or sliding_attention 4 times",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModelError, match=rf"m/config\.json: {message}"):
        read(**changes)


def test_a_fingerprint_never_changes() -> None:
    """Cached references and checkpoints are kept under it. These are of versions without the fields that came later."""
    assert read().fingerprint == "a5ad03885369e0370fce4b5dadcadb78790bed6ad9b0e5af6200293641262c2c"
    assert (
        read(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True).fingerprint
        == "2d6f3e612c424dd0f6cbbd7c65a62533f7318fda34f02d1d2ec8ebc7e0f81ffb"
    )
    assert (
        read(rope_scaling={"rope_type": "llama3", **LLAMA3}).fingerprint
        == "7db62b2539c0014cb2ef2ea36c9f75d5d8d048aab7cd59935a5192fd342d0901"
    )


def test_the_fingerprint_is_of_what_changes_the_output() -> None:
    assert read(torch_dtype="float16").fingerprint == read(max_position_embeddings=9).fingerprint
    assert (
        len({read().fingerprint, read(rms_norm_eps=1e-6).fingerprint, read(tie_word_embeddings=True).fingerprint}) == 3
    )
