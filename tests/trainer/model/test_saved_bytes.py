"""The memory model against what autograd keeps: bytes of a token and a layer, for each kind of recomputation.

And what is given back on CPUs: the same gradients, bit by bit, with less memory.
"""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_api.models import ModelConfig, Multipliers
from dpo_api.sizing import Layout
from dpo_api.sizing.layout import Recomputation
from dpo_api.sizing.memory import activation_bytes_per_token
from dpo_api.sizing.parameters import stages
from dpo_api.spec import Lora
from dpo_testing.models import plain_pack, single_process, token_stream
from dpo_trainer.model import again
from dpo_trainer.model.build import build_model
from dpo_trainer.model.forward import hidden_rows
from dpo_trainer.model.lora import attach_lora

TOKENS = 512


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with single_process():
        yield


PARTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "nemotron": {"norm": "layernorm1p", "activation": "relu2", "rotary_dim": 16},
    "qwen3": {"qk_norm": True},
    "granite": {"multipliers": Multipliers(3.0, 0.1, 0.5, 2.0)},
    "olmo2": {"norm_places": "after", "qk_norm": True, "qk_norm_over_all": True},
    "gemma3_text": {"norm": "rms1p", "norm_places": "both", "activation": "geglu", "qk_norm": True},
}
"""Family → what its layers have that Llama's have not."""


def shape(family: str, layers: int) -> ModelConfig:
    """Return a model with the proportions of Llama 3 8B."""
    return ModelConfig(family, 256, 128, 448, layers, 4, 1, 32, **PARTS[family])


def saved_bytes(config: ModelConfig, recomputation: Recomputation) -> int:
    """Return the bytes of the tensors that a forward pass keeps for the backward pass, each storage once."""
    model = build_model(config, precision="fp32", backend="local", recomputation=recomputation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = hidden_rows(model, plain_pack([token_stream(TOKENS, vocabulary=256)]))
    # Only now: the memory of some has been given back, and others have its address.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    found = sum(size for address, size in storages.items() if address not in own)
    del out
    return found


def saved_by_layer(family: str, recomputation: Recomputation = "none") -> float:
    """Return the bytes that one layer keeps of a token."""
    three, two = (saved_bytes(shape(family, layers), recomputation) for layers in (3, 2))
    return (three - two) / TOKENS


@pytest.fixture
def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(again, "DEVICES", frozenset())


@pytest.mark.usefixtures("keeps_all")
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
@pytest.mark.parametrize("family", list(PARTS))
def test_a_layer_keeps_no_more_than_is_predicted_and_not_much_less(family: str, recomputation: Recomputation) -> None:
    layer = saved_by_layer(family, recomputation)
    predicted = [
        activation_bytes_per_token(
            shape(family, layers).facts, Layout(1, 1, 1, 1, False, recomputation, TOKENS), stages(layers, 1)[0], 4
        )
        for layers in (2, 3)
    ]
    assert layer <= predicted[1] - predicted[0] <= 1.15 * layer


@pytest.mark.parametrize("family", list(PARTS))
def test_a_layer_on_a_cpu_keeps_no_output_of_a_norm_or_an_activation(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shape(family, 2)
    norms = 0 if config.norm_places == "after" else 2  # before attention and MLP
    less = saved_by_layer(family)
    monkeypatch.setattr(again, "DEVICES", frozenset())
    assert saved_by_layer(family) - less == 4 * (norms * config.hidden_size + config.ffn_hidden_size)


ADAPTED = [None, ("attention_qkv",), ("mlp_fc1",), ("all",)]


@pytest.mark.parametrize("modules", ADAPTED, ids=str)
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "nemotron", "olmo2", "gemma3_text"])
def test_gradients_are_the_same_bit_by_bit(
    family: str, recomputation: Recomputation, modules: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for devices in (again.DEVICES, frozenset()):
        monkeypatch.setattr(again, "DEVICES", devices)
        torch.manual_seed(0)
        model = build_model(shape(family, 2), precision="fp32", backend="local", recomputation=recomputation)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        if modules is not None:
            lora = Lora.model_validate({"rank": 4, "targetModules": modules, "rowInit": "normal", "dropout": 0.0})
            attach_lora(model, lora, seed=1)
        rows = hidden_rows(model, plain_pack([token_stream(40, vocabulary=256)]))
        (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        found.append({"rows": rows.detach(), **gradients})
    ours, kept = found
    assert ours.keys() == kept.keys()
    assert len(ours) > 2
    for name, values in ours.items():
        assert torch.equal(values, kept[name]), name


def test_what_was_computed_again_is_let_go_before_the_graph() -> None:
    """The hook is part of the graph, of which ``output`` is still there after the backward pass."""

    class Doubled:
        def __call__(self, x: Tensor) -> Tensor:
            return x * 2

    doubled = Doubled()
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    read = again.repeatable(doubled, x)
    output = torch.nn.functional.linear(read, weight)
    storage, function = read.untyped_storage(), weakref.ref(doubled)
    again.give_back(read, output)
    del read, doubled
    assert storage.nbytes() == 0
    assert function() is not None
    output.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, (2 * x).sum(0).expand(3, 4))
    assert storage.nbytes() == 6 * 4 * 4
    assert function() is None
