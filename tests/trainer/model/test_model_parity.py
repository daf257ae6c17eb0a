"""Our model's logits against transformers': packed, unpacked, with shared prompts; each feature proven to matter."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_api.models import ModelConfig, Multipliers, RopeScaling, YarnScaling
from dpo_testing.families import LOGITS as TOLERANCE
from dpo_testing.families import (
    PAIRS,
    assert_like_the_page,
    logit_differences,
    response_logits,
    theirs,
)
from dpo_testing.models import (
    VARIANTS,
    load_model,
    local_store,
    plain_pack,
    reference_model,
    save_folder,
    shared_pack,
    single_process,
    token_stream,
)
from dpo_trainer.formats.huggingface import load_weights
from dpo_trainer.model.build import build_model
from dpo_trainer.model.forward import head_weight, hidden_rows, logits
from dpo_trainer.model.pack import Pack


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(variant: str) -> Any:
    return reference_model(variant)


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(reference, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return load_model(folder).eval()


def test_logits_alone_packed_and_with_shared_prompts(variant: str, reference: Any, ours: Any) -> None:
    found = logit_differences(reference, ours)
    assert list(found) == ["alone", "packed", "shared prompts"]
    for form, difference in found.items():
        assert difference <= TOLERANCE, form
    assert_like_the_page(variant, "logits", max(found.values()))


@torch.no_grad()
def test_hidden_rows_times_head_are_the_logits(ours: Any) -> None:
    pack = shared_pack(PAIRS)
    rows = hidden_rows(ours, pack)
    assert rows.shape == (len(pack.rows), ours.config.hidden_size)
    torch.testing.assert_close(rows @ head_weight(ours).t(), logits(ours, pack)[pack.rows])


@torch.no_grad()
def test_a_leak_from_chosen_to_rejected_would_be_seen(reference: Any, ours: Any) -> None:
    """A pack whose rejected response sees the chosen one (its parent is prompt + chosen) must fail parity."""
    good = shared_pack(PAIRS)
    prompt, chosen, rejected, *rest = good.segments
    leaky = replace(good, segments=(replace(prompt, end=chosen.end), replace(rejected, parent=0), *_shift(rest)))
    expected = response_logits(reference)
    assert (logits(ours, good)[good.rows] - expected).abs().max() <= TOLERANCE
    assert (logits(ours, leaky)[good.rows] - expected).abs().max() > 1e-2


def _shift(segments: list[Any]) -> list[Any]:
    """The segments of the second pair after one segment before them has gone."""
    return [replace(s, parent=None if s.parent is None else s.parent - 1) for s in segments]


@torch.no_grad()
def test_gradients_do_not_depend_on_the_form(ours: Any) -> None:
    """Shared and unshared packs of the same pairs give the same parameter gradients."""
    unshared = [torch.cat([prompt, response]) for prompt, *responses in PAIRS for response in responses]
    plain = plain_pack(unshared)
    keep, cursor = [], 0
    for prompt, *responses in PAIRS:
        for response in responses:
            keep.append(torch.arange(cursor + len(prompt) - 1, cursor + len(prompt) + len(response) - 1))
            cursor += len(prompt) + len(response)
    plain = replace(plain, rows=torch.cat(keep))
    first, second = _gradients(ours, shared_pack(PAIRS, padding=4)), _gradients(ours, plain)
    for name, gradient in first.items():
        scale = gradient.abs().max().clamp_min(1e-3)
        assert (gradient - second[name]).abs().max() / scale < 1e-4, name


def _gradients(model: Any, pack: Pack) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    with torch.enable_grad():
        rows = hidden_rows(model, pack) @ head_weight(model).t()
        (rows * torch.randn(rows.shape, generator=generator)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert len(found) == len(list(model.parameters()))
    return found


YARN = YarnScaling(2.0, 32, 0.1 * math.log(2) + 1, 4.0)
ANOTHER = {
    "factor": 5.0,
    "original_max_positions": 64,
    "attention_factor": 1.0,
    "beta_fast": 1.5,
    "beta_slow": 0.2,
    "truncate": False,
}
GRANITE = Multipliers(embedding=3.0, attention=0.25, residual=0.6, logits=0.7)
MULTIPLIERS = ("embedding", "attention", "residual", "logits")
FEATURES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama3", "rope scaling", {"rope_scaling": None}),
    ("llama3", "its low frequency factor", {"rope_scaling": RopeScaling("llama3", 16.0, 1.0, 3.0, 32)}),
    ("llama3", "its high frequency factor", {"rope_scaling": RopeScaling("llama3", 16.0, 1.5, 4.0, 32)}),
    ("llama3", "its original length", {"rope_scaling": RopeScaling("llama3", 16.0, 1.5, 3.0, 64)}),
    ("llama-linear", "rope scaling", {"rope_scaling": None}),
    ("llama-yarn", "rope scaling", {"rope_scaling": None}),
    *[("llama-yarn", name, {"rope_scaling": replace(YARN, **{name: value})}) for name, value in ANOTHER.items()],
    ("llama", "rope theta", {"rope_theta": 5e5}),
    ("mistral", "window", {"window": None}),
    ("mistral", "window, by one", {"window": 8}),
    ("qwen2-window", "window", {"window": None}),
    ("qwen2-window", "which layers are windowed", {"windowed_layers": ()}),
    ("llama", "epsilon", {"norm_eps": 0.1}),
    ("nemotron", "channels that turn", {"rotary_dim": 8}),
    ("nemotron", "1 + weight", {"norm": "layernorm"}),
    ("smollm3", "which layers turn", {"rope_layers": ()}),
    ("smollm3", "window", {"window": None}),
    ("smollm3", "which layers are windowed", {"windowed_layers": ()}),
    *[("granite", f"{one} multiplier", {"multipliers": replace(GRANITE, **{one: 1.0})}) for one in MULTIPLIERS],
    ("gemma3", "1 + weight", {"norm": "rms"}),
    ("gemma3", "tanh form", {"activation": "swiglu"}),
    ("gemma3", "embedding multiplier", {"multipliers": Multipliers(attention=24**-0.5)}),
    ("gemma3", "attention multiplier", {"multipliers": Multipliers(embedding=48**0.5)}),
    ("gemma3", "local base", {"local_rope_theta": None}),
    ("gemma3", "rope scaling of the others", {"rope_scaling": None}),
    ("gemma3", "window", {"window": None}),
    ("gemma3", "which layers are windowed", {"windowed_layers": ()}),
    ("phi3", "channels that turn", {"rotary_dim": None}),
    ("phi3", "window", {"window": None}),
    ("stablelm", "no 1 + weight", {"norm": "layernorm1p"}),
    ("stablelm", "channels that turn", {"rotary_dim": 2}),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "feature", "change"), FEATURES, ids=[f"{n}: {f}" for n, f, _ in FEATURES])
def test_each_setting_matters(name: str, feature: str, change: dict[str, Any], tmp_path: Path) -> None:
    folder = save_folder(reference_model(name), tmp_path)
    right = load_model(folder)
    wrong = _with_config(folder, replace(right.dpo_config, **change))
    assert right.dpo_config != wrong.dpo_config
    pack = plain_pack([token_stream(60, seed=8)])
    assert (logits(right, pack) - logits(wrong, pack)).abs().max() > 1e-2


def _with_config(folder: Path, config: ModelConfig) -> Any:
    """The folder's weights in a model of another configuration of the same shapes."""
    model = build_model(config)
    load_weights(model, local_store(), str(folder))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qwen2", "linear_qkv.bias"),
        ("qwen3", "q_layernorm.weight"),
        ("qwen3", "k_layernorm.weight"),
        ("llama", "input_layernorm.weight"),
        ("llama", "final_layernorm.weight"),
        ("nemotron", "input_layernorm.bias"),
        ("nemotron", "pre_mlp_layernorm.bias"),
        ("nemotron", "final_layernorm.bias"),
        ("nemotron", "final_layernorm.weight"),
        ("gemma3", "self_attn_bda.norm.weight"),
        ("gemma3", "mlp_bda.norm.weight"),
        ("gemma3", "q_layernorm.weight"),
        ("olmo2", "self_attn_bda.norm.weight"),
        ("olmo2", "mlp_bda.norm.weight"),
        ("olmo2", "q_layernorm.weight"),
        ("olmo2", "k_layernorm.weight"),
        ("stablelm", "linear_qkv.bias"),
        ("stablelm", "final_layernorm.bias"),
    ],
)
def test_each_small_parameter_matters(name: str, part: str, tmp_path: Path) -> None:
    """Replacing it by what a fresh model holds (zero bias, unit norm) moves the logits."""
    model = load_model(save_folder(reference_model(name), tmp_path))
    pack = plain_pack([token_stream(30, seed=8)])
    before = logits(model, pack)
    for full, parameter in model.named_parameters():
        if full.endswith(part):
            parameter.fill_(0.0 if part.endswith("bias") else 1.0)
    assert (logits(model, pack) - before).abs().max() > 1e-2


@torch.no_grad()
def test_the_order_of_grouped_heads_matters(tmp_path: Path) -> None:
    """Query heads taken in another order than the groups' would be seen."""
    model = load_model(save_folder(reference_model("llama"), tmp_path))
    pack = plain_pack([token_stream(30, seed=8)])
    before = logits(model, pack)
    config = model.dpo_config
    heads, groups, d = config.num_attention_heads, config.num_query_groups, config.head_dim
    for layer in model.decoder.layers:
        weight = layer.self_attention.linear_qkv.weight
        grouped = weight.view(groups, heads // groups + 2, d, -1)
        grouped[:, [0, 1]] = grouped[:, [1, 0]].clone()
    assert (logits(model, pack) - before).abs().max() > 1e-2


@torch.no_grad()
def test_tying_matters(tmp_path: Path) -> None:
    """A tied model read as untied has no head to load; an untied one read as tied answers differently."""
    folder = save_folder(reference_model("llama"), tmp_path)
    right = load_model(folder)
    pack = plain_pack([token_stream(30, seed=8)])
    rows = hidden_rows(right, pack)
    embedding = right.embedding.word_embeddings.weight
    assert (rows @ head_weight(right).t() - rows @ embedding.t()).abs().max() > 1e-2
    tied = load_model(save_folder(reference_model("qwen3"), tmp_path / "tied"))
    assert head_weight(tied) is tied.embedding.word_embeddings.weight


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "llama-linear", "llama-yarn"])
def test_rope_scaling_at_long_positions(name: str, tmp_path: Path) -> None:
    """Parity where scaling acts: 400 tokens on an original context of 32."""
    reference = reference_model(name, max_position_embeddings=512)
    model = load_model(save_folder(reference, tmp_path))
    tokens = token_stream(400, seed=9)
    # Angles of positions near 400 differ by fp32 rounding times 400 radians; the logits by more than 1e-5 only there.
    assert (logits(model, plain_pack([tokens])) - theirs(reference, tokens)).abs().max() <= 5e-5


@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_recomputation_changes_nothing(recomputation: Any, tmp_path: Path) -> None:
    folder = save_folder(reference_model("qwen3"), tmp_path)
    pack = shared_pack(PAIRS, padding=2)
    plain, recomputed = (
        _gradients(load_model(folder), pack),
        _gradients(load_model(folder, recomputation=recomputation), pack),
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_rotary_frequencies_are_exactly_those_of_transformers(reference: Any, ours: Any) -> None:
    rotary = reference.model.rotary_emb
    local = ours.dpo_config.local_rope_theta is not None
    names = ("full_attention_inv_freq", "sliding_attention_inv_freq") if local else ("inv_freq",)
    assert torch.equal(ours.rope_frequencies, torch.stack([getattr(rotary, name) for name in names]))
    assert ours.rope_frequencies.dtype == torch.float32


def test_padding_gets_zero_from_attention(ours: Any) -> None:
    """Nothing of a real token reaches padding: its first attention output is zero."""
    seen: list[Tensor] = []
    hook = ours.decoder.layers[0].self_attention.core_attention.register_forward_hook(
        lambda _module, _args, output: seen.append(output)
    )
    with torch.no_grad():
        hidden_rows(ours, shared_pack(PAIRS, padding=6))
    hook.remove()
    assert bool((seen[0][-6:] == 0).all())
    assert bool((seen[0][:-6] != 0).any(dim=-1).all())
