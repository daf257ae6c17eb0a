"""config.json: what is read, and everything that is refused by name."""

from dataclasses import replace
from typing import Any

import pytest

from dpo_api.errors import InvalidModelError
from dpo_api.models import ModelConfig, Multipliers, RopeScaling, YarnScaling, parse_config

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


GEMMA3 = {"model_type": "gemma3_text", "hidden_act": ..., "num_hidden_layers": 7, "head_dim": 16}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
    "sliding_attention": {"rope_theta": 5e3},
}


def test_gemma_3() -> None:
    config = read(**GEMMA3, sliding_window=512)
    assert (config.norm, config.norm_places, config.activation, config.qk_norm) == ("rms1p", "both", "geglu", True)
    assert (config.tied_embeddings, config.num_query_groups, config.rope_theta) == (True, 4, 1e6)
    assert config.multipliers == Multipliers(embedding=8.0, attention=1 / 16)
    assert [config.window_of(layer) for layer in range(7)] == [512, 512, 512, 512, 512, None, 512]
    assert [config.rope_of(layer) for layer in range(7)] == [1, 1, 1, 1, 1, 0, 1]
    assert config.local_rope_theta == 1e4
    assert read(**GEMMA3, sliding_window_pattern=2).window_of(1) is None
    old = read(**GEMMA3, rope_theta=2e6, rope_local_base_freq=5e3, rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = read(**GEMMA3, rope_parameters=NESTED)
    assert old == new
    assert (new.rope_theta, new.local_rope_theta, new.rope_scaling) == (2e6, 5e3, RopeScaling("linear", 8.0))
    full = read(**GEMMA3, layer_types=["full_attention"] * 7)
    assert (full.window, full.local_rope_theta, full.rope_of(0)) == (None, None, 0)


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
    smollm3 = read(model_type="smollm3", num_hidden_layers=5)
    assert (smollm3.tied_embeddings, smollm3.rope_theta, smollm3.num_query_groups) == (True, 2e6, 4)
    assert [smollm3.rope_of(layer) for layer in range(5)] == [0, 0, 0, None, 0]
    assert [read(model_type="smollm3", no_rope_layers=[1, 0, 1, 1]).rope_of(i) for i in range(4)] == [0, None, 0, 0]
    assert read(model_type="smollm3", no_rope_layers=[1] * 4).rope_layers == ()
    without = read(
        model_type="smollm3", use_sliding_window=True, sliding_window=9
    )  # transformers' default: NoPE layers
    assert [without.window_of(layer) for layer in range(4)] == [None, None, None, 9]
    slides = {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": [*["full_attention"] * 3, "sliding_attention"],
    }
    assert [read(model_type="smollm3", **slides).window_of(i) for i in range(4)] == [None, None, None, 9]
    granite = {"embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22}
    assert read(model_type="granite", logits_scaling=16, **granite).multipliers == Multipliers(
        12.0, 0.0078125, 0.22, 16.0
    )
    assert read(model_type="granite").multipliers == Multipliers(attention=1.0)
    olmo2 = read(model_type="olmo2", rms_norm_eps=...)
    assert (olmo2.norm_eps, olmo2.norm_places, olmo2.qk_norm, olmo2.qk_norm_over_all) == (1e-5, "after", True, True)
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
    (
        {"model_type": "smollm3", "no_rope_layers": [1, 0]},
        r"no_rope_layers is \[1, 0\]: it must hold 0 or 1 for each of",
    ),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0, 2, 1]}, r"no_rope_layers is \[1, 0, 2, 1\]"),
    (
        {"model_type": "smollm3", "use_sliding_window": False, "layer_types": ["sliding_attention"] * 4},
        r"use_sliding_window is false: but layer_types names layers with a window",
    ),
    ({"model_type": "granite", "residual_multiplier": -1}, r"residual_multiplier is -1: it must be a positive number"),
    ({"model_type": "gemma2"}, r'model_type is "gemma2": its caps of scores and logits .*; supported are llama'),
    ({"model_type": "gemma3"}, r'model_type is "gemma3": it reads images; .*\(gemma3_text\)'),
    ({**GEMMA3, "final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30.0: a cap of the logits"),
    ({**GEMMA3, "attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50.0: a cap of the attention's scores"),
    ({**GEMMA3, "use_bidirectional_attention": True}, r"use_bidirectional_attention is true"),
    ({**GEMMA3, "hidden_activation": "gelu"}, r'hidden_activation is "gelu": only gelu_pytorch_tanh'),
    (
        {**GEMMA3, "rope_parameters": {"rope_type": "default"}},
        r"rope_parameters is .*it must hold sliding_attention and full_attention",
    ),
    (
        {**GEMMA3, "rope_parameters": {**NESTED, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        r'rope_parameters.sliding_attention.rope_type is "linear": only default',
    ),
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
