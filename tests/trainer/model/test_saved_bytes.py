"""The memory model against what autograd keeps: bytes of a token and a layer, for each kind of recomputation."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
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
from dpo_testing.models import plain_pack, single_process, token_stream
from dpo_trainer.model.build import build_model
from dpo_trainer.model.forward import hidden_rows

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
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = hidden_rows(model, plain_pack([token_stream(TOKENS, vocabulary=256)]))
    found = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    del out
    return found


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
@pytest.mark.parametrize("family", list(PARTS))
def test_a_layer_keeps_no_more_than_is_predicted_and_not_much_less(family: str, recomputation: Recomputation) -> None:
    three, two = (saved_bytes(shape(family, layers), recomputation) for layers in (3, 2))
    layer = (three - two) / TOKENS
    predicted = [
        activation_bytes_per_token(
            shape(family, layers).facts, Layout(1, 1, 1, 1, False, recomputation, TOKENS), stages(layers, 1)[0], 4
        )
        for layers in (2, 3)
    ]
    assert layer <= predicted[1] - predicted[0] <= 1.15 * layer
